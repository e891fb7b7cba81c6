"""Ctrl-C and other signals, taken without raising exceptions at random places.

Python's own handler for SIGINT raises KeyboardInterrupt wherever the program happens to be. Inside a callback that JAX
calls the exception is swallowed and the program runs on; during an import it prints a traceback. And while the main
thread waits for a compiled program, no handler written in Python runs at all. So:

- The C-level handler writes the signal's number to a pipe, and a thread that reads the pipe can end the process at any
  time, whatever the main thread waits for.
- The Python-level handler only notes the signal; `check`, called between steps, raises `Interrupted`.

What an interrupt does depends on what the process is doing, its `Mode`. This module imports nothing but the standard
library, so that it is in place before JAX is imported.
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
_STEP_PATIENCE = 1.0  # seconds for which a step may go on after a signal
_SAVING_PATIENCE = 2.0  # seconds for which an exit waits for a compiled program to be written to the cache


class Mode(enum.Enum):
    """What SIGINT does."""

    LEAVE = "it ends the process at once"
    STEP = "it ends the work at the next `check`, or the process where that takes long or at a second one"
    KEEP = "it ends the work at the next `check`, however often it comes: there is something to lose"
    RAISE = "it raises `Interrupted` where the main thread is, so that temporary files are removed"


class Interrupted(BaseException):
    """A signal came; `code` is the exit code that it stands for."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """128 and the signal's number, as shells have it."""
        return 128 + self.number


class _State:
    mode = Mode.LEAVE
    pending: int | None = None  # noted by the handler, in the main thread
    count = 0  # of SIGINTs since the mode was entered, kept by the watching thread
    hidden_cursor = False
    reading: object | None = None  # set while a line is read, for each line another


def install() -> None:
    """Takes SIGINT, unless the process was started with SIGINT ignored, as shells start background jobs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _note)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()
    if pending() is not None:  # it came before anything could be read from the pipe
        _leave(128 + signal.SIGINT)


def take(*numbers: int) -> None:
    """Takes further signals, as `Mode.KEEP` takes SIGINT."""
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def give_back() -> None:
    """Undoes `install`, for a server that has handlers of its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def mode(new: Mode) -> Iterator[None]:
    """Another mode for the body; an interrupt that came in it and was not checked is raised at its end."""
    old = _State.mode
    _State.count = 0
    _State.mode = new
    try:
        yield
        check()
    finally:
        _State.mode = old


def check() -> None:
    """Raises `Interrupted` where a signal has come; call it between steps."""
    number = _State.pending
    if number is not None:
        _State.pending = None
        raise Interrupted(number)


def check_terminal() -> None:
    """Raises `Interrupted` where the input has ended because the terminal has gone, and not by Ctrl-D."""
    time.sleep(_REACTION)  # the end is seen just before SIGHUP comes
    check()
    if not os.isatty(0):
        raise Interrupted(signal.SIGHUP)


def pending() -> int | None:
    """The signal that has come and was not raised yet."""
    return _State.pending


def read_line(prompt: str) -> str:
    """As `input`, but a signal raises `Interrupted`."""
    _State.reading = object()
    try:
        check()
        return input(prompt)
    finally:
        _State.reading = None


@contextmanager
def hidden_cursor() -> Iterator[None]:
    """Says that the body hides the cursor of the terminal, to be shown again where the process ends in it."""
    _State.hidden_cursor = True
    try:
        yield
    finally:
        _State.hidden_cursor = False


def _note(number: int, frame: FrameType | None) -> None:
    """The handler: notes the signal, and raises only where no code but ours is interrupted."""
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
    """Reads the numbers of signals from the pipe, and ends the process where the mode says so."""
    deadline: float | None = None
    while True:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], timeout)[0]:  # a step takes long: perhaps it is being compiled
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
    """Sends a signal again while the main thread reads the same line: it came just before the thread went to sleep."""
    time.sleep(_REACTION)
    if _State.reading is line:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _leave(code: int) -> None:
    """Ends the process without running any of its code again."""
    main = threading.main_thread().ident
    deadline = time.monotonic() + _SAVING_PATIENCE
    # JAX does not write the files of its compilation cache atomically, and never replaces half a file.
    while _any_frame(sys._current_frames().get(main or 0), "put_executable_and_time"):
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    if os.isatty(2):
        os.write(2, b"\r\x1b[K\x1b[?25h" if _State.hidden_cursor else b"\n")
    os._exit(code)
