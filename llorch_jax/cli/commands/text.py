"""Commands that write text: generate and chat."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llorch_jax.cli.options import CacheOption, JsonOption, ModelOption, option, with_settings

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
_BATCH_SIZE = 8


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
    ] = _BATCH_SIZE,
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
    if file is None and (overwrite or batch_size != _BATCH_SIZE):
        raise typer.BadParameter("--batch-size, --overwrite: expected --file with them")
    if file is not None and (as_json or timings):
        raise typer.BadParameter("--file: expected neither --json nor --timings with it")
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
