"""Shared by all commands: messages on standard error, spinners and bars, warnings, the compilation cache."""

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llorch_jax.cli import interrupts
from llorch_jax.errors import EngineError

PATIENCE = 0.4  # seconds before a step says that it is running
messages = Console(stderr=True, highlight=False)


def note(text: str, style: str = "dim") -> None:
    """Prints one message on standard error."""
    messages.print(text, style=style, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """Prints what a command has to say about its result; of several processes only the first does."""
    import jax

    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        note(text, style="")


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR is set."""
    import jax

    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if directory is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = str(Path(base) / "llorch_jax" / "xla")
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    warnings.showwarning = _Warnings(directory)


class _Warnings:
    """Shows each warning as one line; those of the compilation cache, one per program, are shown only once."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.told = False

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if "persistent compilation cache" in text:
            if self.told:
                return
            self.told = True
            reason = text.partition("': ")[2]
            text = f"compiled programs cannot be kept in {self.directory} ({reason})"
        note(f"warning: {text}", style="yellow")


@contextmanager
def waiting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a spinner with `what` once the body has run for a moment, if there is a terminal.

    Yields:
        A function that adds a percentage: it takes the amount done and the total.
    """
    what = escape(what)
    status = messages.status(f"{what} ...")
    timer = threading.Timer(PATIENCE, status.start)
    timer.daemon = True
    if not messages.is_terminal:
        yield lambda done, total: None
        return
    with interrupts.hidden_cursor():
        timer.start()
        try:
            yield lambda done, total: status.update(f"{what} {done / max(total, 1):.0%}")
        finally:
            timer.cancel()
            timer.join(PATIENCE)
            status.stop()


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if there is a terminal; yields a function of the amount done and the total."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        interrupts.hidden_cursor(),
        Progress(*columns, console=messages, disable=not messages.is_terminal) as progress,
    ):
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_timings(load_seconds: float, timings: Any) -> None:
    """Prints one line: load, compile, prefill, milliseconds per token; `timings` are `Timings`."""
    tell(
        f"load {load_seconds:.2f} s, compile {timings.compile:.2f} s, prefill {1000 * timings.prefill:.1f} ms, "
        f"{timings.ms_per_token:.2f} ms/token over {timings.new_tokens} tokens"
    )


def show_bytes(count: int) -> str:
    """A number of bytes in readable form: exact, and in MB if it is large."""
    return f"{count:,} bytes" if count < 10**6 else f"{count:,} bytes ({count / 1e6:,.1f} MB)"


def read_bytes(name: str, text: str) -> int:
    """The number of bytes that a text such as 500MB, 1.5 GiB or 4096 stands for.

    Raises:
        EngineError: it is something else; the message begins with the name.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt])(i?))?b?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None:
        raise EngineError(f"{name}: expected a number of bytes such as 500MB, 1.5GiB or 0, got {text!r:.80}")
    number, prefix, binary = found.groups()
    unit = (1024 if binary else 1000) ** " kmgt".index((prefix or " ").lower())
    return int(Fraction(number) * unit)
