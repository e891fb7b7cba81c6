"""Ctrl-C and other signals, handled without raising exceptions at arbitrary places.

Python's default handler for SIGINT raises KeyboardInterrupt wherever the program happens to be. Inside a callback from
JAX the exception is swallowed and the program continues; during an import it prints a traceback. And while the main
thread waits for a compiled program, no handler written in Python runs at all. So:

- The C-level handler writes the signal's number to a pipe, and a thread that reads the pipe can end the process at any
  time, whatever the main thread is waiting for.
- The Python-level handler only records the signal; `check`, called between steps, raises `Interrupted`.

What an interrupt does depends on the current `Mode`. This module imports only the standard library, so that it is
active before JAX is imported.
"""

import enum
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REACTION = 0.05  # seconds within which reading a line reacts to a signal
_STEP_PATIENCE = 1.0  # seconds for which a step may continue after a signal
_SAVING_PATIENCE = 2.0  # seconds for which an exit waits for a compiled program to be written to the cache


class Mode(enum.Enum):
    """What SIGINT does."""

    LEAVE = "ends the process at once"
    STEP = "ends the work at the next `check`, or the process if that takes long or the signal is repeated"
    KEEP = "ends the work at the next `check`, even if repeated: there is something to lose"
    RAISE = "raises `Interrupted` in the main thread's current code, so that temporary files are removed"


class Interrupted(BaseException):
    """A signal arrived; `code` is the corresponding exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """128 plus the signal's number, as in shells."""
        return 128 + self.number


class _State:
    mode = Mode.LEAVE
    pending: int | None = None  # recorded by the handler, in the main thread
    count = 0  # number of SIGINTs since the mode was entered, counted by the watching thread
    hidden_cursor = False
    reading: object | None = None  # a different object for each line while it is read


def install() -> None:
    """Handles SIGINT, unless the process was started with SIGINT ignored, as shells start background jobs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _note)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()
    if pending() is not None:  # it arrived before the pipe was read
        _leave(128 + signal.SIGINT)


def take(*numbers: int) -> None:
    """Handles further signals in the way in which `Mode.KEEP` handles SIGINT."""
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def give_back() -> None:
    """Undoes `install`, for a server with its own handlers."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def mode(new: Mode) -> Iterator[None]:
    """Sets the mode for the body; an interrupt that arrived in it without being checked is raised at its end."""
    old = _State.mode
    _State.count = 0
    _State.mode = new
    try:
        yield
        check()
    finally:
        _State.mode = old


def check() -> None:
    """Raises `Interrupted` if a signal has arrived; call it between steps."""
    number = _State.pending
    if number is not None:
        _State.pending = None
        raise Interrupted(number)


def check_terminal() -> None:
    """Raises `Interrupted` if the input has ended because the terminal was closed, and not by Ctrl-D."""
    time.sleep(_REACTION)  # the end of the input is seen just before SIGHUP arrives
    check()
    if not os.isatty(0):
        raise Interrupted(signal.SIGHUP)


def pending() -> int | None:
    """The signal that has arrived and has not been raised yet."""
    return _State.pending


def read_line(prompt: str) -> str:
    """Like `input`, but a signal raises `Interrupted`."""
    _State.reading = object()
    try:
        check()
        return input(prompt)
    finally:
        _State.reading = None


@contextmanager
def hidden_cursor() -> Iterator[None]:
    """Marks that the body hides the terminal's cursor, which is shown again if the process ends in it."""
    _State.hidden_cursor = True
    try:
        yield
    finally:
        _State.hidden_cursor = False


def _note(number: int, frame: FrameType | None) -> None:
    """The handler: records the signal, and raises only where no foreign code is interrupted."""
    _State.pending = number
    if frame is None:
        return
    if frame.f_code is read_line.__code__:
        check()
    # The garbage collector's callbacks and finalizers would swallow the exception.
    if _State.mode is Mode.RAISE and not _any_frame(frame, "_xla_gc_callback", "__del__"):
        _State.mode = Mode.KEEP  # the next one does not interrupt the removal of files
        check()


def _any_frame(frame: FrameType | None, *names: str) -> bool:
    """Whether a function with one of these names is running in the frame or in one of its callers."""
    while frame is not None:
        if frame.f_code.co_name in names:
            return True
        frame = frame.f_back
    return False


def _watch(reading: int) -> None:
    """Reads the numbers of signals from the pipe, and ends the process if the mode says so."""
    deadline: float | None = None
    while True:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], timeout)[0]:  # a long step: it may be compiling
            if _State.mode is Mode.STEP:
                _leave(128 + signal.SIGINT)
            deadline = None
            continue
        number = os.read(reading, 1)[0]
        line = _State.reading
        if line is not None:
            _repeat(number, line)
        if number != signal.SIGINT:
            continue
        _State.count += 1
        if _State.mode is Mode.LEAVE or (_State.mode is Mode.STEP and _State.count > 1):
            _leave(128 + signal.SIGINT)
        deadline = time.monotonic() + _STEP_PATIENCE


def _repeat(number: int, line: object) -> None:
    """Resends a signal as long as the main thread reads the same line: each may arrive just before the read."""
    time.sleep(_REACTION)
    while _State.reading is line:
        signal.pthread_kill(threading.main_thread().ident or 0, number)
        time.sleep(_REACTION)


def _leave(code: int) -> None:
    """Ends the process without running any more of its code."""
    main = threading.main_thread().ident
    deadline = time.monotonic() + _SAVING_PATIENCE
    # JAX does not write the files of its compilation cache atomically, and never replaces an incomplete one.
    while _any_frame(sys._current_frames().get(main or 0), "put_executable_and_time"):
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    if os.isatty(2):
        os.write(2, b"\r\x1b[K\x1b[?25h" if _State.hidden_cursor else b"\n")
    os._exit(code)
