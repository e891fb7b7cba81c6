"""Commands in a pseudo-terminal of their own, as a user's terminal runs them: Ctrl-C there is a key."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import jax

# Makes the terminal that of the process, and undoes what shells and nohup do to jobs, among which tests may run.
_TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "signal.signal(signal.SIGINT, signal.SIG_DFL); signal.signal(signal.SIGHUP, signal.SIG_DFL);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def environment(**more):
    """The tests' own environment, with their cache of compiled programs and a plain terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "NO_COLOR")}
    cache = jax.config.jax_compilation_cache_dir
    kept |= {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
    root = str(Path(__file__).parents[1])
    return {**kept, "PYTHONPATH": root, "TERM": "dumb", "COLUMNS": "200", **more}


class Terminal:
    """`llorch-jax` with these arguments, running in a pseudo-terminal."""

    def __init__(self, *arguments, env=None):
        self.seen = ""
        self.main, child = pty.openpty()
        command = [sys.executable, "-S", "-E", "-c", _TAKE_TERMINAL, "-m", "llorch_jax", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, env=env or environment(), start_new_session=True
        )
        os.close(child)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.hang_up()

    def hang_up(self):
        """Closes the terminal, as closing its window does: the process gets SIGHUP, and its input ends."""
        if self.main is not None:
            os.close(self.main)
        self.main = None

    def send(self, text):
        """Types a text."""
        os.write(self.main, text.encode())

    def wait_for_handler(self, seconds=60):
        """Waits until the process has a second thread, the one that watches for interrupts."""
        deadline = time.monotonic() + seconds
        tasks = Path(f"/proc/{self.process.pid}/task")
        while self.process.poll() is None and len(os.listdir(tasks)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def until(self, pattern, seconds=120):
        """Reads until the pattern is there, and returns what came before it and with it."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, self.seen
            assert self._read(1), self.seen
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def finish(self, seconds=120):
        """Exit code, negative after a signal, and what was printed since the last look."""
        deadline = time.monotonic() + seconds
        while self._read(0.2):
            assert time.monotonic() < deadline, self.seen
        return self.process.wait(seconds), self.seen

    def drain(self, seconds):
        """Reads for a while, so that the process does not wait for a reader."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self._read(left):
            continue

    def _read(self, seconds):
        """Reads what is there, for `seconds` at most; False once the process has closed the terminal."""
        if not select.select([self.main], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.main, 65536)
        except OSError:  # EIO: nobody holds the other end
            return False
        self.seen += data.decode(errors="replace").replace("\r", "")
        return bool(data)
