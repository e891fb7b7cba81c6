"""`llorch-jax score`, `inspect`, `validate`, `convert`, `quantize` and `bench`."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llorch_jax import kernels
from llorch_jax.cache.planning import plan_memory
from llorch_jax.cli import interrupts
from llorch_jax.cli.loading import load_model
from llorch_jax.cli.terminal import show_bytes, waiting
from llorch_jax.cli.values import text_or_stdin
from llorch_jax.cores import usable_cores
from llorch_jax.errors import QuantizationError
from llorch_jax.evaluation.perplexity import score
from llorch_jax.evaluation.speed import measure_speed
from llorch_jax.evaluation.validation import Verdict, compare, intermediates, load_reference
from llorch_jax.loading import checkpoint, reading
from llorch_jax.loading.gguf_files import GGUF
from llorch_jax.params import count_params, nbytes, param_shapes
from llorch_jax.quantization import quantized_shapes


def show_score(source: str, text: str, settings: dict[str, Any], stride: int | None, as_json: bool) -> None:
    """Prints perplexity, bits per byte and the log-probability of a text."""
    given = text_or_stdin(text)
    model, _ = load_model(source, settings)
    with waiting("compiling and scoring"):
        result = score(model, given, stride=stride)
    summary: dict[str, float | None] = {
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "logprob": result.total,
    }
    if as_json:
        if not math.isfinite(result.perplexity):
            summary["perplexity"] = None  # JSON has no infinity
        print(json.dumps({**summary, **dataclasses.asdict(result)}, allow_nan=False))
    else:
        print(*(f"{name} {value:.4f}" for name, value in summary.items()), sep="\n")


def inspect_kernels() -> None:
    """Prints which native kernels this machine runs, or why it runs none."""
    found = kernels.describe()
    if found.isa is None:
        print(f"native kernels: none, XLA's own products are used instead; {found.reason}")
    else:
        print(f"native kernels: {found.isa}, for weights in {', '.join(found.formats)}")


def inspect(source: str, cache: str, settings: dict[str, Any]) -> None:
    """Prints a model's configuration and the bytes of its parameters and cache, as the settings store them."""
    _, directory = checkpoint.locate(source)
    asked = settings.pop("weights", None), settings.pop("group_size", None)
    if directory.is_dir():
        config = reading.load_config(directory)
        weights, group_size = reading.format_for(reading.format_in(directory), *asked)
        reading.check_size(directory, config)
        stored_weights = f"{show_bytes(nbytes(quantized_shapes(config, weights, group_size)))} in {weights}"
    else:
        if asked != (None, None):
            raise QuantizationError(f"weights: expected none with a GGUF file, which is shown as it is, got {asked[0]}")
        file = GGUF.open(directory)
        config = file.config()
        stored_weights = file.describe()
    plan = plan_memory(config, cache, **settings)  # before anything is printed, as it may refuse
    table = Table("setting", "value", title=escape(source))
    for field in dataclasses.fields(config):
        table.add_row(field.name, str(getattr(config, field.name)))
    Console().print(table)
    print(f"parameters: {count_params(param_shapes(config)):,}; {stored_weights}")
    stored = f" of {settings['codec']}" if "codec" in settings else ""
    print(f"{cache} cache{stored}: {show_bytes(plan.total)} per sequence of up to {config.n_positions} tokens")
    if plan.full != plan.total:
        print(f"  and {show_bytes(plan.full)} once it has grown to that length")
    print(f"  {show_bytes(plan.per_token)} per token in {config.cache_layers} layers")


def validate(source: str, reference: Path, settings: dict[str, Any]) -> bool:
    """Prints one line per validation point; returns whether all passed."""
    arrays, temperature = load_reference(reference)
    model, _ = load_model(source, settings)
    greedy = arrays.get("12_greedy")
    new_tokens = greedy.shape[-1] if greedy is not None and greedy.size and greedy.ndim else 1
    with waiting("compiling and running"):
        captured = intermediates(
            model.params, model.config, arrays["tokens"], temperature=temperature, new_tokens=new_tokens
        )
    verdicts = compare(captured, arrays)
    Console().print(_verdict_table(verdicts))
    return all(verdict.passed for verdict in verdicts)


def convert(source: str, directory: Path, dtype: str, overwrite: bool) -> None:
    """Writes a model; an interrupt removes incomplete output."""
    with waiting("converting"), interrupts.mode(interrupts.Mode.RAISE):
        checkpoint.convert(source, directory, dtype=dtype, overwrite=overwrite)
    print(f"wrote {directory}")


def quantize(source: str, directory: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Writes a model in low precision; an interrupt removes incomplete output."""
    with waiting("quantizing") as progress, interrupts.mode(interrupts.Mode.RAISE):
        checkpoint.quantize_model(source, directory, **settings, progress=progress, overwrite=overwrite)
    print(f"wrote {directory}")


def bench(source: str, settings: dict[str, Any], as_json: bool) -> None:
    """Prints the medians and ranges of `measure_speed`."""
    model, _ = load_model(source, settings)
    with waiting("compiling and measuring"):
        speed = measure_speed(model, **settings)
    if as_json:
        rates = {name: getattr(speed, name) for name in ("prefill_tokens_per_second", "decode_tokens_per_second")}
        print(json.dumps({**dataclasses.asdict(speed), **rates}))
        return
    table = Table("work", "median", "range", "tokens per second")
    for work, seconds, rate in (
        (f"prefill, {speed.batch} x {speed.prompt_tokens} tokens", speed.prefill, speed.prefill_tokens_per_second),
        (f"decode step, {speed.batch} x 1 token", speed.step, speed.decode_tokens_per_second),
    ):
        median = f"{1000 * statistics.median(seconds):.2f} ms"
        table.add_row(work, median, f"{1000 * min(seconds):.2f} to {1000 * max(seconds):.2f} ms", f"{rate:,.0f}")
    Console().print(table)
    cores = f"{usable_cores()} core{'s' if usable_cores() > 1 else ''}"
    print(f"compiled in {speed.compile:.2f} s; {len(speed.step)} measurements on {cores}")


def _verdict_table(verdicts: list[Verdict]) -> Table:
    table = Table("point", "what", "largest error", "allowed", "verdict")
    for verdict in verdicts:
        point = verdict.point
        outcome = "pass" if verdict.passed else f"FAIL {verdict.note}".rstrip()
        table.add_row(str(point.number), point.what, f"{verdict.error:.2e}", f"{point.tolerance:.0e}", outcome)
    return table
