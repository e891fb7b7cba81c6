"""Handling of standard streams that are closed, full, or have lost their reader."""

import errno
import io
import os
import sys
from typing import IO, Any


class OutputError(Exception):
    """Standard output cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}")
        self.is_broken_pipe = error.errno == errno.EPIPE

    @property
    def code(self) -> int:
        """141, as after SIGPIPE, if the reader has closed the pipe, as `head` does; else 1."""
        return 141 if self.is_broken_pipe else 1


class _Output(io.TextIOWrapper):
    """Standard output whose errors are `OutputError`s, so that they are not mistaken for errors in files."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error) from None


class _Messages(io.TextIOWrapper):
    """Standard error, which silently drops messages that cannot be written."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            return


def prepare() -> None:
    """Opens closed streams, so that no file gets their descriptors, and wraps the streams.

    A closed stream is opened in the wrong direction: writing to standard output, and reading from standard input, then
    fails as with a closed one. Characters that the terminal's encoding lacks are written as question marks.
    """
    for descriptor, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free descriptor, which is this one
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    sys.stdout = _wrapped(sys.stdout, 1, _Output)
    sys.stderr = _wrapped(sys.stderr, 2, _Messages)


def set_apart(shown: bool) -> int:
    """Moves the streams to descriptors of their own, away from what libraries written in C++ print on 1 and 2.

    Args:
        shown: whether standard output goes anywhere at all.

    Returns:
        The descriptor of standard error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stdout = _wrapped(sys.stdout, out if shown else nowhere, _Output)
    sys.stderr = _wrapped(sys.stderr, err, _Messages)
    return err


def _wrapped(stream: IO[Any] | None, descriptor: int, kind: type[io.TextIOWrapper]) -> io.TextIOWrapper:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    interactive = os.isatty(descriptor)
    raw = io.FileIO(descriptor, "w", closefd=False)
    errors = "backslashreplace" if kind is _Messages else "replace"
    return kind(io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=interactive)
