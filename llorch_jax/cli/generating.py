"""`llorch-jax generate`: continues a prompt as text or JSON, or the prompts of a file."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from llorch_jax.cli import interrupts
from llorch_jax.cli.loading import load_model
from llorch_jax.cli.terminal import bar, show_timings, tell, waiting
from llorch_jax.cli.values import resolve, text_or_stdin
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.batch_file import generate_file
from llorch_jax.text.generation import generate, stream
from llorch_jax.text.results import Generation
from llorch_jax.text.speculative import generate_speculative
from llorch_jax.text.timing import Timings


def is_search(settings: dict[str, Any]) -> bool:
    """Whether the settings select a search, whose text is known only at the end."""
    return "num_beams" in settings or "penalty_alpha" in settings


def one(source: str, prompt: str, settings: dict[str, Any], streamed: bool, as_json: bool, timings: bool) -> None:
    """Continues one prompt on standard output: in pieces, at the end, or as JSON."""
    text = text_or_stdin(prompt)
    model, load_seconds = load_model(source, settings)
    settings = resolve(settings, model.tokenizer)
    if streamed and not as_json and not is_search(settings):
        spent = _streamed(model, text, settings)
    else:
        with waiting("compiling and generating"):
            out = generate(model, text, **settings)
        print(_as_json(text, out) if as_json else text + out.text)
        spent = out.timings
    if timings:
        show_timings(load_seconds, spent)


def _streamed(model: Model, prompt: str, settings: dict[str, Any]) -> Timings:
    pieces = stream(model, prompt, **settings)
    with waiting("compiling"):
        piece = next(pieces)
    try:
        with interrupts.mode(interrupts.Mode.STEP), contextlib.closing(pieces):
            print(prompt, piece.text, sep="", end="", flush=True)
            for piece in pieces:
                print(piece.text, end="", flush=True)
                interrupts.check()
    finally:
        print()
    return piece.timings


def from_file(
    source: str,
    file: Path,
    target: Path,
    batch_size: int,
    overwrite: bool,
    settings: dict[str, Any],
    where: tuple[str, int | None, float] | None = None,
) -> None:
    """Continues the prompts of a file; see `generate_file`, and that of `llorch_jax.ray`.

    Args:
        source: of the model.
        file: the prompts.
        target: of the results.
        batch_size: maximum number of prompts that run at once.
        overwrite: whether to replace the target.
        settings: from the command line.
        where: for a Ray cluster, its address, the number of actors, and the processors of each.
    """
    runs: dict[str, Any] = {"batch_size": batch_size, "overwrite": overwrite}
    if where is None:
        model, _ = load_model(source, settings)
        with bar("prompts") as progress:
            count = generate_file(model, file, target, **runs, progress=progress, **resolve(settings, model.tokenizer))
    else:
        from llorch_jax import ray

        address, actors, cpus = where
        pool = ray.Pool(actors, cpus)
        stored = ray.Source.of(source, settings.get("weights"), settings.get("group_size"))
        with ray.cluster(address, pool):
            model, _ = load_model(source, settings)
            options = resolve(settings, model.tokenizer)
            count = ray.generate_file(model, stored, file, target, pool=pool, **runs, **options)
    tell(f"continued {count} prompts; all results are in {target}")


def speculate(
    source: str,
    prompt: str,
    settings: dict[str, Any],
    speculative: str | None,
    draft: str | None,
    as_json: bool,
    timings: bool,
) -> None:
    """Prints the text at the end, and on standard error how many guesses were accepted."""
    text = text_or_stdin(prompt)
    model, load_seconds = load_model(source, settings)
    settings = resolve(settings, model.tokenizer)
    guesses: Any = load_model(draft, {})[0] if draft else speculative
    with waiting("compiling and generating"):
        out, stats = generate_speculative(model, text, draft=guesses, **settings)
    print(_as_json(text, out) if as_json else text + out.text)
    tell(
        f"guesses: {stats.acceptance_rate:.0%} of {stats.proposed.sum()} accepted, {stats.tokens_per_step:.2f} tokens "
        f"per step over {stats.steps} steps"
    )
    if timings:
        show_timings(load_seconds, out.timings)


def _as_json(prompt: str, out: Generation) -> str:
    fields = dataclasses.asdict(out)
    fields["timings"]["ms_per_token"] = out.timings.ms_per_token
    return json.dumps({"prompt": prompt, **fields}, ensure_ascii=False)
