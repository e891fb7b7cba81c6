"""The command line: what it is called, what it runs, and what its errors mean to users.

JAX is imported only when a command runs, so that help, completion and usage errors are immediate.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from llorch_jax import __version__
from llorch_jax.cli.commands import model, serve, text
from llorch_jax.cli.options import explain
from llorch_jax.cli.streams import OutputError
from llorch_jax.cli.terminal import note
from llorch_jax.errors import LlorchError

app = typer.Typer(
    help="GPT-2 inference in JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns the exit code."""
    try:
        try:
            code = _code_of(arguments)
        finally:
            sys.stdout.flush()
        if code == 0 and "llorch_jax.cli.devices" in sys.modules:
            sys.modules["llorch_jax.cli.devices"].leave()
        return code
    except OutputError as error:
        if not error.is_broken_pipe:
            note(f"error: {error}", style="red")
        return error.code
    except LlorchError as error:
        note(f"error: {explain(error)}", style="red")
    except MemoryError:
        note("error: out of memory", style="red")
    except RuntimeError as error:
        note(f"error: {_of_runtime(error)}", style="red")
    return 1


def _code_of(arguments: Sequence[str] | None) -> int:
    try:
        app(arguments, prog_name="llorch-jax")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _of_runtime(error: RuntimeError) -> str:
    """What a RuntimeError means to users; raises it again if that is unknown."""
    from llorch_jax.cli.devices import LOST, is_lost

    reason = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in reason:
        return f"out of memory ({reason})"
    if is_lost(error):
        return f"{LOST} ({reason:.200})"
    raise error


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"llorch-jax {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """GPT-2 inference in JAX."""


# In the order of the help.
app.command(name="generate")(text.generate_command)
app.command(name="chat")(text.chat_command)
app.command(name="score")(model.score_command)
app.command(name="inspect")(model.inspect_command)
app.command(name="validate")(model.validate_command)
app.command(name="convert")(model.convert_command)
app.command(name="quantize")(model.quantize_command)
app.command(name="bench")(model.bench_command)
app.command(name="serve")(serve.serve_command)
