"""Several samples of a prompt, and the best of them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.placement import placed
from llorch_jax.decoding.loop import generate_from
from llorch_jax.decoding.request import Request
from llorch_jax.decoding.steps import begin, first_logits
from llorch_jax.errors import OptionError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.collecting import collect, steps_of
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.prompts import make_batch, prompt_list
from llorch_jax.text.results import Generation
from llorch_jax.text.timing import Stopwatch
from llorch_jax.tracing import whole

_MOST_SAMPLES = 4096  # rows of one batch per prompt; more is probably a mistake, and would run out of memory


def generate_n(
    model: Model,
    prompt: str | list[str],
    n: int = 4,
    max_new_tokens: int = 64,
    *,
    best_of: int | None = None,
    **options: Any,
) -> list[Generation] | list[list[Generation]]:
    """Several continuations of a prompt, which is prefilled only once; its cache is forked.

    The samples of one prompt have the tokens of `generate(model, [prompt] * n, ...)` with the same options; those of
    several prompts the tokens of `generate` with each of the prompts n times in a row.

    Args:
        model: from `load`.
        prompt: the text to continue, or several.
        n: number of continuations of each.
        max_new_tokens: maximum number of new tokens of each continuation.
        best_of: how many are drawn, n or more; the n with the greatest mean log-probability per token are returned,
            best first. None draws n and returns them as they are.
        options: as in `generate`; see docs/options.md for those that apply. The temperature is 1 unless you say
            otherwise. With num_beams it is a beam search whose n best beams are returned. A paged cache shares the
            prompt's pages between the samples.

    Returns:
        n generations, or a list of n for each prompt if `prompt` is a list.

    Raises:
        ModelError, TokenError, CapacityError, SamplerError: as `generate`.
        OptionError: n or best_of is invalid, an option has no effect here, or the temperature is 0, which would make
            all samples alike.
    """
    whole("n", n, OptionError, most=_MOST_SAMPLES)
    drawn = n if best_of is None else whole("best_of", best_of, OptionError, n, _MOST_SAMPLES)
    prompts = prompt_list(prompt)
    if options.get("num_beams") not in (None, 1):
        checked = GenerationOptions.create(max_new_tokens=max_new_tokens, **options)
        groups = _beams(model, prompts, checked, n, best_of)
    else:
        if options.get("sampler") is None:
            options = {"temperature": 1.0, **options}
        checked = GenerationOptions.create(max_new_tokens=max_new_tokens, **options)
        if checked.sampler is None and isinstance(checked.temperature, int | float) and checked.temperature == 0:
            raise OptionError("temperature: expected more than 0 for different samples, got 0")
        samples = _draw(model, prompts, checked, drawn)
        groups = [samples[start : start + drawn] for start in range(0, len(samples), drawn)]
    if best_of is not None:
        groups = [sorted(group, key=mean_logprob, reverse=True)[:n] for group in groups]
    return groups[0] if isinstance(prompt, str) else groups


def mean_logprob(generation: Generation) -> float:
    """Mean log-probability per token of what was generated, in nats."""
    return math.fsum(generation.logprobs) / len(generation.logprobs)


def _beams(
    model: Model, prompts: list[str], options: GenerationOptions, n: int, best_of: int | None
) -> list[list[Generation]]:
    from llorch_jax.text.search import beams

    if best_of is not None:
        raise OptionError(f"best_of: expected none with beam search, which returns the n best beams, got {best_of}")
    return beams(model, prompts, options, n)


def _draw(model: Model, prompts: list[str], options: GenerationOptions, copies: int) -> list[Generation]:
    """`copies` samples of each prompt in one batch, after a prefill of one row per prompt."""
    watch = Stopwatch()
    batch = make_batch(model, prompts, options, "generate_n", copies)
    logits, after = first_logits(model.params, model.config, _without_copies(batch.request, copies))
    jax.block_until_ready(logits)
    prefill_seconds = watch.lap()
    state = begin(batch.request, jnp.repeat(logits, copies, axis=0), placed(model.params.mesh, after.fork(copies)))
    generated, _ = generate_from(model.params, model.config, batch.request, state)
    return collect(steps_of(generated, batch.eos_ids), batch.rows, watch, prefill_seconds)


def _without_copies(request: Request, copies: int) -> Request:
    """The request for the first of every `copies` rows, in the parts that a prefill uses."""
    firsts = np.arange(0, request.tokens.shape[0], copies, dtype=np.int32)
    lengths = np.asarray(request.lengths)[firsts]
    return dataclasses.replace(
        request,
        tokens=request.tokens[firsts],
        lengths=lengths,
        cache=request.cache.select(firsts).reserve(lengths),  # selecting rows may give up what was reserved for them
    )
