"""Several samples from one prompt, and the best of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.layouts import fit_cache
from llorch_jax.decoding.branching import check_whole
from llorch_jax.decoding.loop import generate_from
from llorch_jax.decoding.request import prepare
from llorch_jax.decoding.steps import first_logits
from llorch_jax.errors import SearchError, TokenError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import Sampler, make_sampler
from llorch_jax.text.results import Generation, ending_of, generation_of, key_of_seed, tokenizer_of
from llorch_jax.text.timing import Stopwatch, Timings


def generate_n(
    model: Model,
    prompt: str,
    n: int = 4,
    max_new_tokens: int = 64,
    *,
    best_of: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: str = "static",
) -> list[Generation]:
    """Several continuations of one prompt, which is prefilled only once; its cache is forked.

    Sample i has the tokens of row i of `generate(model, [prompt] * n, ...)` with the same settings.

    Args:
        model: from `load`.
        prompt: the text to continue.
        n: how many continuations are returned.
        max_new_tokens: how many tokens each gets at most.
        best_of: how many are drawn, n or more; the n with the greatest mean log-probability per token are returned,
            best first. None draws n and returns them as they are.
        temperature: above 0.
        top_k: draw from this many most likely tokens.
        top_p: draw from the most likely tokens that reach this probability.
        seed: of the draws.
        cache: layout of the KV cache, as in `generate`; a paged one shares the prompt's pages between the samples.

    Raises:
        ModelError, TokenError, CapacityError, SamplerError: as `generate`.
        SearchError: n or best_of is impossible, or the temperature is 0, which would make all samples alike.
    """
    check_whole("n", n)
    drawn = n if best_of is None else best_of
    check_whole("best_of", drawn, least=n)
    if temperature == 0:
        raise SearchError("temperature: expected more than 0 for different samples, got 0")
    samples = _draw(
        model, prompt, drawn, max_new_tokens, make_sampler(temperature, top_k=top_k, top_p=top_p), seed, cache
    )
    return samples if best_of is None else sorted(samples, key=mean_logprob, reverse=True)[:n]


def mean_logprob(generation: Generation) -> float:
    """Mean log-probability per token of what was generated, in nats."""
    return math.fsum(generation.logprobs) / len(generation.logprobs)


def _draw(
    model: Model, prompt: str, count: int, max_new_tokens: int, sampler: Sampler, seed: int, cache: str
) -> list[Generation]:
    """So many samples in one batch, after a prefill of one row."""
    watch = Stopwatch()
    ids = tokenizer_of(model).encode(prompt)
    if not ids:
        raise TokenError("prompt: expected at least one token, got an empty text")
    config, eos_id = model.config, model.config.eos_ids
    # A cache for all rows of which one is taken: a paged one then has pages for all.
    empty = fit_cache(config, cache, count, min(len(ids) + max(max_new_tokens, 1) - 1, config.n_positions))
    single = empty.select(np.zeros(1, np.int32))
    request = prepare(config, [ids], max_new_tokens, single, sampler=sampler, key=jax.random.key(0), eos_id=eos_id)
    logits, after = first_logits(model.params, config, request)
    jax.block_until_ready(logits)
    prefill_seconds = watch.lap()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key_of_seed(seed), jnp.arange(count))
    policy = dataclasses.replace(request.policy, keys=keys)
    request = dataclasses.replace(request, policy=policy, finished=jnp.zeros(count, bool))
    logits = jnp.repeat(logits, count, axis=0)
    generated, _ = generate_from(model.params, config, request, logits, after.fork(count))
    generated = jax.device_get(generated)
    timings = Timings(watch.compile, prefill_seconds, watch.lap(), generated.tokens.shape[1])
    ending = ending_of(model, None, ())
    rows = [generation_of(model, ids, generated, row, ending) for row in range(count)]
    return [dataclasses.replace(row, timings=timings) for row in rows]
