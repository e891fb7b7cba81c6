"""The command line."""

import os
import sys
from typing import NoReturn

from llorch_jax.cli import interrupts, streams


def main() -> NoReturn:
    """Runs the command line and ends the process.

    Exit codes: 0 success, 1 bad input or a failed validation, 2 wrong usage, 130 interrupted, 141 if the reader of
    standard output has closed the pipe.
    """
    streams.prepare()  # first: otherwise the interrupts' pipe would get the descriptor of a closed standard input
    interrupts.install()
    try:
        from llorch_jax.cli.app import run

        code = run()
    except interrupts.Interrupted as interrupt:
        code = interrupt.code
    # Skip the interpreter's shutdown: XLA's threads may still be running, and an interrupt would go unnoticed.
    _flush()
    signal_number = interrupts.pending()
    os._exit(code if signal_number is None else 128 + signal_number)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except streams.OutputError:
            continue
