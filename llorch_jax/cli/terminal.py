"""What the commands share: messages on the terminal, the compilation cache, errors as one line."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llorch_jax.text.timing import Timings

PATIENCE = 1.0  # seconds before a step says that it is running
messages = Console(stderr=True, highlight=False)


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless the user has named a directory or none."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "llorch_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextmanager
def waiting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a spinner with `what` once the body has run for a second, where there is a terminal.

    Yields:
        A function that adds a percentage: it takes what is done and what there is to do.
    """
    what = escape(what)
    status = messages.status(f"{what} ...")
    timer = threading.Timer(PATIENCE, status.start)
    timer.daemon = True
    if messages.is_terminal:
        timer.start()
    try:
        yield lambda done, total: status.update(f"{what} {done / max(total, 1):.0%}")
    finally:
        timer.cancel()
        timer.join(PATIENCE) if timer.is_alive() else None
        status.stop()


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where there is a terminal; yields a function of what is done and the total."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, disable=not messages.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_timings(load_seconds: float, timings: Timings) -> None:
    """One line: load, compile, prefill, milliseconds per token."""
    messages.print(
        f"load {load_seconds:.2f} s, compile {timings.compile:.2f} s, prefill {1000 * timings.prefill:.1f} ms, "
        f"{timings.ms_per_token:.2f} ms/token over {timings.new_tokens} tokens"
    )


def show_bytes(count: int) -> str:
    """A number of bytes for people: exact, and in MB where that says more."""
    return f"{count:,} bytes" if count < 10**6 else f"{count:,} bytes ({count / 1e6:,.1f} MB)"
