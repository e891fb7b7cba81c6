"""Beam search and contrastive search for texts."""

from collections.abc import Sequence

import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.decoding.beam import beam_search
from llorch_jax.decoding.contrastive import contrastive_search
from llorch_jax.decoding.overflow import padded
from llorch_jax.decoding.scoring import token_logprobs
from llorch_jax.decoding.steps import Generated
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.collecting import Growing, collect, steps_of
from llorch_jax.text.ending import Ending
from llorch_jax.text.options import CANDIDATES, GenerationOptions, Method, per_prompt
from llorch_jax.text.prompts import Prompt, encode_prompts
from llorch_jax.text.results import Generation
from llorch_jax.text.timing import Stopwatch
from llorch_jax.text.vocabulary import known_ids, tokenizer_of


def search_texts(model: Model, prompts: Sequence[Prompt], options: GenerationOptions) -> list[Generation]:
    """The text that the search named by the options finds for each prompt."""
    if options.num_beams is not None:
        return [best for (best,) in beams(model, prompts, options, 1)]
    return _contrastive(model, prompts, options)


def beams(model: Model, prompts: Sequence[Prompt], options: GenerationOptions, n: int) -> list[list[Generation]]:
    """The n best beams for each prompt, best first."""
    watch = Stopwatch()
    _check(model, prompts, options, "beam search")
    width = options.num_beams or 1
    ids = encode_prompts(model, prompts)
    (limit,) = set(options.limits(len(prompts)))
    ending = Ending.of(model, options, limit)
    tokens, lengths = padded(ids)
    found = beam_search(
        model.params,
        model.config,
        tokens,
        limit,
        num_beams=width,
        num_return=n,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        num_beam_groups=options.num_beam_groups,
        diversity_penalty=options.diversity_penalty,
        eos_id=ending.ids or None,
        cache=_cache(model, options, ids, width, limit - 1),
        lengths=lengths,
        allowed=known_ids(tokenizer_of(model), model.config.vocab_size),
    )
    new = found.tokens.reshape(-1, found.tokens.shape[-1])
    repeated = [row for row in ids for _ in range(n)]
    outputs = _results(model, repeated, new, found.lengths.reshape(-1), ending, watch)
    return [outputs[start : start + n] for start in range(0, len(outputs), n)]


def _check(model: Model, prompts: Sequence[Prompt], options: GenerationOptions, method: Method) -> None:
    """Raises LlorchError for options that fit neither the search nor the model, or not as many prompts."""
    options.check_method(method)
    options.check_model(model)
    if isinstance(options.seed, tuple):  # without effect, but wrong all the same
        per_prompt("seed", options.seed, len(prompts))


def _contrastive(model: Model, prompts: Sequence[Prompt], options: GenerationOptions) -> list[Generation]:
    watch = Stopwatch()
    _check(model, prompts, options, "contrastive search")
    width = options.sampling.get("top_k", CANDIDATES)
    ids = encode_prompts(model, prompts)
    (limit,) = set(options.limits(len(prompts)))
    ending = Ending.of(model, options, limit)
    tokens, lengths = padded(ids)
    new, _ = contrastive_search(
        model.params,
        model.config,
        tokens,
        limit,
        top_k=width,
        penalty_alpha=options.penalty_alpha or 0.0,
        eos_id=ending.ids or None,
        cache=_cache(model, options, ids, width, limit),
        lengths=lengths,
        allowed=known_ids(tokenizer_of(model), model.config.vocab_size),
    )
    found = np.asarray(new)
    ends = np.isin(found, ending.ids)
    counts = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, found.shape[1])
    return _results(model, ids, found, counts, ending, watch)


def _cache(model: Model, options: GenerationOptions, ids: list[list[int]], width: int, new: int) -> KVCache:
    """A cache of a row per prompt; a paged one has pages for all branches, so it is made for these first."""
    needed = min(max(map(len, ids)) + new, model.config.n_positions)
    whole_cache = options.fitted_cache(model.config, len(ids) * width, needed, model.params.mesh)
    return whole_cache.select(np.arange(len(ids), dtype=np.int32))


def _results(
    model: Model, ids: list[list[int]], new: np.ndarray, counts: np.ndarray, ending: Ending, watch: Stopwatch
) -> list[Generation]:
    """Generations of new tokens [B, N], of which the first `counts` [B] are real; the search counts as decoding."""
    logprobs = np.zeros(new.shape, np.float32)
    for row, (prompt, count) in enumerate(zip(ids, counts.tolist(), strict=True)):
        whole_row = [*prompt, *new[row, :count].tolist()]
        logprobs[row, :count] = token_logprobs(model.params, model.config, whole_row)[len(prompt) - 1 :]
    generated = Generated(new, logprobs)
    rows = [Growing(tokenizer_of(model), ending, prompt) for prompt in ids]
    return collect(steps_of(generated, ending.ids), rows, watch, prefill_seconds=0.0)
