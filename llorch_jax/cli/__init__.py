"""The command line."""

import os
import sys
from typing import NoReturn

from llorch_jax.cli import interrupts, streams


def main() -> NoReturn:
    """Runs the command line and ends the process.

    Exit codes: 0 done, 1 bad input or a failed validation, 2 wrong usage, 130 interrupted, 141 where the reader of
    standard output has gone.
    """
    streams.prepare()  # first, or a closed standard input would be taken by the pipe of the interrupts
    interrupts.install()
    try:
        from llorch_jax.cli.app import run

        code = run()
    except interrupts.Interrupted as interrupt:
        code = interrupt.code
    # Without the interpreter's own end: XLA's threads may still be at work, and an interrupt would go unnoticed.
    _flush()
    signal_number = interrupts.pending()
    os._exit(code if signal_number is None else 128 + signal_number)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except streams.OutputError:
            continue
