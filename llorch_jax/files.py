"""Files that users name: read or replaced as a whole, with every failure explained in one line.

Only regular files are read or replaced. A pipe would block forever, a device may have no end, and replacing one as root
would remove it for the whole system.
"""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llorch_jax.errors import LlorchError

PathLike = str | os.PathLike[str]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LONGEST = 200  # characters of a path that a message shows


def shown(path: PathLike) -> str:
    """A path as one line of a message that any terminal can print."""
    text = os.fspath(path)
    if not text.isprintable():
        text = text.encode("unicode_escape").decode("ascii")
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}...{text[-half:]}"


@contextlib.contextmanager
def explaining(path: PathLike, error: type[LlorchError], doing: str = "read", advice: str = "") -> Iterator[None]:
    """Turns errors of the operating system and Python about a path into one-line errors of the caller's class.

    Args:
        path: named in the message.
        error: class of the error.
        doing: what cannot be done with it: "read" or "written".
        advice: what to do about it, added to the message.

    Raises:
        error: in place of an OSError, and of the ValueErrors for names with NUL or lone surrogates.
    """
    then = f"; {advice}" if advice else ""
    try:
        yield
    except LlorchError:
        raise
    except OSError as failure:
        raise error(f"{shown(path)}: cannot be {doing} ({failure.strerror or failure}){then}") from None
    except (UnicodeEncodeError, ValueError) as failure:
        if "null" not in str(failure) and not isinstance(failure, UnicodeEncodeError):
            raise
        raise error(f"{shown(path)}: cannot be {doing} (no file can have this name){then}") from None


def check_regular(path: PathLike, error: type[LlorchError], advice: str = "") -> None:
    """Raises `error` unless there is a regular file at the path, or a symbolic link to one."""
    with explaining(path, error, advice=advice):
        _check_kind(path, os.stat(path), error)


def exists(path: PathLike, error: type[LlorchError]) -> bool:
    """Whether the path exists; raises `error` if that cannot be determined."""
    with explaining(path, error):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def read_bytes(path: PathLike, error: type[LlorchError], advice: str = "") -> bytes:
    """The contents of a regular file.

    Raises:
        error: there is no such file, it is not a regular file, or it cannot be read.
    """
    check_regular(path, error, advice)
    with explaining(path, error, advice=advice):
        # If the file has since become a pipe, opening it without O_NONBLOCK would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check_kind(path, os.fstat(descriptor), error)
            return file.read()


def read_text(path: PathLike, error: type[LlorchError], advice: str = "") -> str:
    """The contents of a regular file in UTF-8; errors as for `read_bytes`."""
    content = read_bytes(path, error, advice)
    try:
        return content.decode()
    except UnicodeDecodeError as failure:
        then = f"; {advice}" if advice else ""
        raise error(f"{shown(path)}: expected UTF-8 text, got something else ({failure}){then}") from None


def read_json(path: PathLike, error: type[LlorchError], advice: str = "") -> Any:
    """The JSON value in a regular file; errors as for `read_bytes`."""
    then = f"; {advice}" if advice else ""
    content = read_bytes(path, error, advice)
    try:
        return parse_json(content.decode())
    except ValueError as failure:
        raise error(f"{shown(path)}: expected JSON, got something else ({failure}){then}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def replace_file(path: PathLike, write: Callable[[BinaryIO], Any], error: type[LlorchError]) -> None:
    """Writes a file atomically: an existing file is replaced only by a complete one.

    A symbolic link is kept, and its target replaced. A replaced file keeps its permissions.

    Args:
        path: of the file.
        write: called with the open file.
        error: class of the error.

    Raises:
        error: the path exists and is not a regular file, or it cannot be written.
    """
    with explaining(path, error, "written"):
        target = os.path.realpath(path)
        try:
            old = os.stat(target)
        except FileNotFoundError:
            old = None
        if old is not None:
            _check_kind(path, old, error)
        partial = os.path.join(os.path.dirname(target), f".saving-{secrets.token_hex(8)}")
        try:
            with open(partial, "xb") as file:
                if old is not None:
                    os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            Path(partial).unlink(missing_ok=True)


def _check_kind(path: PathLike, status: os.stat_result, error: type[LlorchError]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise error(f"{shown(path)}: expected a regular file, got {kind}")
