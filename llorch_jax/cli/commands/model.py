"""Commands about a model: score, inspect, validate, convert, quantize and bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llorch_jax.cli.options import CacheOption, JsonOption, ModelArgument, ModelOption, option, with_settings

TextArgument = Annotated[str, typer.Argument(metavar="TEXT", help="Text; - reads standard input.")]


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
