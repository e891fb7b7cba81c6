"""Saving conversations that would be lost because a signal, a full disk or a fault ends the program."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import gettempdir

from llorch_jax.cli.terminal import note
from llorch_jax.errors import LlorchError
from llorch_jax.text.chat import Chat


@contextlib.contextmanager
def on_failure(unsaved: Callable[[], Mapping[str, Chat]]) -> Iterator[None]:
    """If the body ends with an exception, writes each unsaved conversation to a new file, and prints its name."""
    try:
        yield
    except BaseException:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for name, chat in unsaved().items():
            _rescue(chat, f"chat-{stamp}-{os.getpid()}-{_plain(name)}")
        raise


def _rescue(chat: Chat, name: str) -> None:
    for place in (_state_folder, gettempdir):
        with contextlib.suppress(OSError, RuntimeError, LlorchError):  # no home, a full disk, no permission
            folder = Path(place())
            folder.mkdir(parents=True, exist_ok=True)
            chat.save(folder / name, with_cache=False)
            note(f"the conversation was saved in {folder / name}; continue it with chat --session FILE")
            return
    note("error: the conversation could not be saved anywhere", style="red")


def _state_folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "llorch_jax"


def _plain(name: str) -> str:
    """A branch's name in a form that can be part of a file name."""
    return "".join(each if each.isalnum() else "-" for each in name)[:40]
