"""Turns typed at a prompt: line editing and history if available, and texts of several lines."""

import contextlib
import os
import sys

from llorch_jax.cli.interrupts import read_line
from llorch_jax.errors import ChatError

PROMPT = "> "
MORE = ". "
QUOTES = '"""'


def use_history() -> None:
    """Gives `input` line editing, and a history on the arrow keys, if Python was built with readline."""
    if not is_interactive():
        return
    with contextlib.suppress(ImportError):
        import readline

        readline.set_auto_history(True)


def is_interactive() -> bool:
    """Whether standard input and output are a terminal."""
    try:
        return sys.stdin.isatty() and sys.stdout.isatty()
    except ValueError:  # closed
        return False


def has_colors() -> bool:
    """Whether the terminal shows colours, and the user wants them."""
    return is_interactive() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def colored(text: str, code: str) -> str:
    """A text in a colour, if the terminal shows colours."""
    return f"\x1b[{code}m{text}\x1b[0m" if has_colors() else text


def read_turn() -> str:
    '''A line, or the lines between """ and """.

    Raises:
        EOFError: the input has ended.
        Interrupted: a signal arrived.
        ChatError: the line is not text in the terminal's encoding.
    '''
    line = _line(PROMPT)
    if not line.lstrip().startswith(QUOTES):
        return line
    text = line.lstrip()[len(QUOTES) :]
    while QUOTES not in text:
        text += "\n" + _line(MORE)
    return text[: text.rindex(QUOTES)].removeprefix("\n")


def _line(prompt: str) -> str:
    shown = prompt if is_interactive() else ""
    if has_colors() and "readline" in sys.modules:
        shown = f"\x01\x1b[1;32m\x02{prompt}\x01\x1b[0m\x02"  # readline must not count invisible characters
    try:
        return read_line(shown)
    except UnicodeDecodeError as error:
        raise ChatError(f"input: expected text in {error.encoding}, got {error.object[error.start :][:8]!r}") from None
    except OSError as error:
        raise EOFError(f"standard input: {error.strerror}") from None
