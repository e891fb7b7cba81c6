"""The command line: commands and their options. The modules that the commands import do the work.

JAX is imported only when a command runs, so that help, completion and usage errors are immediate.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llorch_jax import __version__
from llorch_jax.cli.options import (
    CacheOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    explain,
    option,
    with_settings,
)
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

LengthOption = Annotated[
    int, option("--max-new-tokens", "-n", metavar="N", help="Maximum number of new tokens.", panel="Length and ending")
]
OverflowOption = Annotated[
    str,
    option(
        "--overflow",
        metavar="error|reencode",
        help="At the end of the context: refuse, or keep the first and newest tokens and continue.",
        panel="Length and ending",
    ),
]
TextArgument = Annotated[str, typer.Argument(metavar="TEXT", help="Text; - reads standard input.")]


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


@app.command(name="generate")
@with_settings(
    "Model",
    "Devices",
    "Processes",
    "Cache",
    "Sampling",
    "Penalties",
    "Length and ending",
    "Constraints",
    "Search and speculation",
)
def generate_command(
    settings: dict[str, Any],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue; - reads standard input.")
    ] = None,
    model: ModelOption = "demo",
    cache: CacheOption = "static",
    max_new_tokens: LengthOption = 64,
    overflow: OverflowOption = "error",
    stream: Annotated[
        bool, option("--stream/--no-stream", help="Print each piece as soon as it is generated.", panel="Output")
    ] = True,
    as_json: JsonOption = False,
    top_logprobs: Annotated[
        int, option("--top-logprobs", metavar="N", help="In JSON: the N most likely tokens per step.", panel="Output")
    ] = 0,
    timings: Annotated[bool, option("--timings", help="Print timings on standard error.", panel="Output")] = False,
    speculative: Annotated[
        str | None,
        option(
            "--speculative",
            metavar="lookup",
            help="Guess several tokens from repetitions in the text.",
            panel="Search and speculation",
        ),
    ] = None,
    draft: Annotated[
        str | None,
        option(
            "--draft",
            metavar="MODEL",
            help="Smaller model that guesses several tokens.",
            panel="Search and speculation",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        option("--file", metavar="FILE", help='JSON lines like {"prompt": "Once"}.', panel="Prompts from a file"),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "--out",
            metavar="FILE",
            help="Output file, with --ray a directory; an interrupted run resumes.",
            panel="Prompts from a file",
        ),
    ] = None,
    batch_size: Annotated[
        int, option("--batch-size", metavar="N", help="Prompts per batch, 1 or more.", panel="Prompts from a file")
    ] = 8,
    overwrite: Annotated[
        bool, option("--overwrite", help="Replace the output file.", panel="Prompts from a file")
    ] = False,
    ray: Annotated[
        str | None,
        option(
            "--ray",
            metavar="ADDRESS",
            help="Ray cluster that runs the prompts: HOST:PORT, auto, or local for a new one on this machine.",
            panel="Prompts from a file",
        ),
    ] = None,
    actors: Annotated[
        int | None,
        option(
            "--actors",
            metavar="N",
            help="With --ray: number of copies of the model; by default as many as fit.",
            panel="Prompts from a file",
        ),
    ] = None,
    cpus: Annotated[
        float, option("--cpus", metavar="X", help="With --ray: processors of each copy.", panel="Prompts from a file")
    ] = 1,
) -> None:
    """Continue a text, or the prompts of a file.

    In the options N is a whole number, X any number, and P a number from 0 to 1.
    """
    if (prompt is None) == (file is None) or (file is None) != (out is None):
        raise typer.BadParameter("expected a prompt, or --file and --out")
    if top_logprobs and not as_json and file is None:
        raise typer.BadParameter("--top-logprobs: expected --json or --file with it, as only these show them")
    if speculative and draft:
        raise typer.BadParameter("--speculative, --draft: expected one of them, got both")
    if file is not None and (speculative or draft):
        raise typer.BadParameter("--file: expected neither --speculative nor --draft with it")
    if ray is None and (actors is not None or cpus != 1):
        raise typer.BadParameter("--actors, --cpus: expected --ray with them")
    if ray is not None and file is None:
        raise typer.BadParameter("--ray: expected --file and --out with it")
    together = [name for name in ("mesh", "coordinator", "processes", "process") if settings.get(name) is not None]
    if ray is not None and together:
        raise typer.BadParameter(f"--ray: expected no --{together[0]} with it: each copy of the model has one device")
    from llorch_jax.cli import generating

    given = {**settings, "cache": cache, "max_new_tokens": max_new_tokens}
    if overflow != "error":
        given["overflow"] = overflow
    if top_logprobs:
        given["top_logprobs"] = top_logprobs
    if file is not None and out is not None:
        where = None if ray is None else (ray, actors, cpus)
        generating.from_file(model, file, out, batch_size, overwrite, given, where)
    elif speculative or draft:
        generating.speculate(model, prompt or "", given, speculative, draft, as_json, timings)
    else:
        generating.one(model, prompt or "", given, stream, as_json, timings)


@app.command(name="chat")
@with_settings("Model", "Devices", "Cache", "Sampling", "Penalties", "Length and ending")
def chat_command(
    settings: dict[str, Any],
    model: ModelOption = "demo",
    cache: CacheOption = "static",
    max_new_tokens: LengthOption = 64,
    overflow: OverflowOption = "error",
    system: Annotated[
        str, option("--system", metavar="TEXT", help="Text at the start of the conversation.", panel="Conversation")
    ] = "",
    user: Annotated[
        str, option("--user", metavar="NAME", help="Name of the user's role.", panel="Conversation")
    ] = "User",
    assistant: Annotated[
        str, option("--assistant", metavar="NAME", help="Name of the model's role.", panel="Conversation")
    ] = "Assistant",
    raw: Annotated[bool, option("--raw", help="No roles: the model continues the text.", panel="Conversation")] = False,
    session: Annotated[
        Path | None,
        option("--session", metavar="FILE", help="Conversation to continue; kept up to date.", panel="Conversation"),
    ] = None,
) -> None:
    """Talk with a model, or write a text in turns; /help lists the commands.

    In the options N is a whole number, X any number, and P a number from 0 to 1.
    """
    if max_new_tokens < 1:
        raise typer.BadParameter(f"--max-new-tokens: expected 1 or more, got {max_new_tokens}")
    from llorch_jax.cli import chat

    roles = None if raw else (user, assistant)
    chat.start(model, {**settings, "cache": cache, "overflow": overflow}, max_new_tokens, system, roles, session)


@app.command(name="score")
@with_settings("Model", "Devices")
def score_command(
    settings: dict[str, Any],
    text: TextArgument,
    model: ModelOption = "demo",
    stride: Annotated[
        int | None, option("--stride", metavar="N", help="Tokens by which the window over a long text advances.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how likely a model finds a text: perplexity and bits per byte."""
    from llorch_jax.cli import models

    models.show_score(model, text, settings, stride, as_json)


@app.command(name="inspect")
@with_settings("Model", "Cache")
def inspect_command(
    settings: dict[str, Any],
    model: ModelArgument = "demo",
    cache: CacheOption = "static",
    kernels: Annotated[
        bool, option("--kernels", help="Only show which native kernels this machine runs.", panel="Output")
    ] = False,
) -> None:
    """Show a model's configuration and the bytes of its parameters and cache, without loading the weights."""
    from llorch_jax.cli import models

    if kernels:
        models.inspect_kernels()
    else:
        models.inspect(model, cache, settings)


@app.command(name="validate")
@with_settings("Model")
def validate_command(
    settings: dict[str, Any],
    model: ModelArgument,
    reference: Annotated[
        Path, option("--reference", "-r", metavar="FILE", help=".npz file with the reference arrays.")
    ],
) -> None:
    """Compare a model with reference arrays at twelve points; the exit code is 1 if any of them differs."""
    from llorch_jax.cli import models

    if not models.validate(model, reference, settings):
        raise typer.Exit(1)


@app.command(name="convert")
def convert_command(
    model: ModelArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Directory to write.")],
    dtype: Annotated[
        str, option("--dtype", metavar="TYPE", help="Type of the weights: float32, float16 or bfloat16.")
    ] = "float32",
    overwrite: Annotated[bool, option("--overwrite", help="Replace the files of a model in the directory.")] = False,
) -> None:
    """Write a model as a directory in Hugging Face format."""
    from llorch_jax.cli import models

    models.convert(model, directory, dtype, overwrite)


@app.command(name="quantize")
@with_settings("Model")
def quantize_command(
    settings: dict[str, Any],
    model: ModelArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Directory to write.")],
    overwrite: Annotated[bool, option("--overwrite", help="Replace the files of a model in the directory.")] = False,
) -> None:
    """Write a model with its weights in low precision, as given by --weights."""
    if "weights" not in settings:
        raise typer.BadParameter("expected --weights, such as --weights int8")
    from llorch_jax.cli import models

    models.quantize(model, directory, settings, overwrite)


@app.command(name="bench")
@with_settings("Model", "Cache")
def bench_command(
    settings: dict[str, Any],
    model: ModelArgument = "demo",
    cache: CacheOption = "static",
    batch: Annotated[int, option("--batch", metavar="N", help="Number of rows.")] = 1,
    prompt_tokens: Annotated[int, option("--prompt-tokens", metavar="N", help="Prompt tokens per row.")] = 64,
    new_tokens: Annotated[int, option("--new-tokens", metavar="N", help="New tokens per row, 2 or more.")] = 64,
    repeats: Annotated[int, option("--repeats", metavar="N", help="Number of measurements.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Measure how long a model's prefill and decode step take on this machine."""
    from llorch_jax.cli import models

    numbers = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    models.bench(model, {**settings, **numbers, "cache": cache}, as_json)


@app.command(name="serve")
@with_settings("Model", "Devices")
def serve_command(
    settings: dict[str, Any],
    model: ModelArgument = "demo",
    host: Annotated[
        str, option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all.", panel="Server")
    ] = "127.0.0.1",
    port: Annotated[
        int, option("--port", metavar="N", help="Port to listen on; 0 for any free one.", panel="Server")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="Key that clients must send.",
            envvar="LLORCH_JAX_API_KEY",
            show_envvar=False,
            rich_help_panel="Server",
        ),
    ] = None,
    name: Annotated[
        str | None, option("--name", metavar="NAME", help="Name of the model in responses.", panel="Server")
    ] = None,
    max_body: Annotated[
        int, option("--max-body", metavar="N", help="Maximum bytes per request body.", panel="Server")
    ] = 1 << 20,
    max_texts: Annotated[
        int, option("--max-texts", metavar="N", help="Maximum number of texts per request.", panel="Server")
    ] = 64,
    drain_seconds: Annotated[
        float,
        option(
            "--drain-seconds", metavar="X", help="Seconds for running requests to finish at the end.", panel="Server"
        ),
    ] = 30.0,
    slots: Annotated[
        int, option("--slots", metavar="N", help="Maximum number of requests that run at once.", panel="Engine")
    ] = 8,
    num_pages: Annotated[
        int | None,
        option("--num-pages", metavar="N", help="Pages of the cache; by default a context per slot.", panel="Engine"),
    ] = None,
    page_size: Annotated[int, option("--page-size", metavar="N", help="Tokens per page.", panel="Engine")] = 32,
    codec: Annotated[
        str | None,
        option("--codec", metavar="CODEC", help="Storage format of keys and values, such as int8.", panel="Engine"),
    ] = None,
    chunk: Annotated[
        int, option("--chunk", metavar="N", help="Prompt tokens per step while others decode.", panel="Engine")
    ] = 64,
    max_waiting: Annotated[
        int, option("--max-waiting", metavar="N", help="Maximum number of waiting requests.", panel="Engine")
    ] = 1024,
    offload_bytes: Annotated[
        str,
        option(
            "--offload-bytes",
            metavar="SIZE",
            help="Main memory for cached prefixes that leave the cache, such as 2GB; 0 is off.",
            panel="Engine",
        ),
    ] = "0",
    prefix_cache: Annotated[
        Path | None,
        option("--prefix-cache", metavar="FILE", help="File to keep cached prefixes across restarts.", panel="Engine"),
    ] = None,
    warm_up: Annotated[
        bool, option("--warm-up/--no-warm-up", help="Compile everything before listening.", panel="Engine")
    ] = True,
) -> None:
    """Serve a model over HTTP to many users, with OpenAI's API and a page for trying it out.

    In the options N is a whole number, X any number, and SIZE a number of bytes: 4096, 500MB, 1.5GiB.
    """
    from llorch_jax.cli import serving

    engine = {"slots": slots, "num_pages": num_pages, "page_size": page_size, "codec": codec}
    engine |= {"chunk": chunk, "max_waiting": max_waiting, "offload_bytes": offload_bytes}
    limits = {"name": name, "api_key": api_key, "max_body": max_body, "max_texts": max_texts}
    serving.start(model, settings, engine, limits, host, port, drain_seconds, warm_up, prefix_cache)
