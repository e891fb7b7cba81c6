"""Text in, text out, by speculative decoding."""

import dataclasses
from typing import Literal

import jax

from llorch_jax.decoding.speculative.drafts import Draft, DraftModel, PromptLookup
from llorch_jax.decoding.speculative.loop import Speculation, begin, finish
from llorch_jax.errors import DraftError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import make_sampler
from llorch_jax.text.results import Generation, ending_of, generation_of, text_request
from llorch_jax.text.timing import Stopwatch, Timings


def generate_speculative(
    model: Model,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    draft: Literal["lookup"] | Model | Draft = "lookup",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: str = "static",
) -> tuple[Generation, Speculation]:
    """Continues a prompt as `generate` does, by speculative decoding; see `speculate_tokens` for what is exact.

    Args:
        model: from `load`.
        prompt: the text to continue.
        max_new_tokens: how many tokens it gets at most.
        draft: "lookup" for `PromptLookup()`, a smaller model with the same vocabulary, or a `Draft` with settings.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: draw from this many most likely tokens.
        top_p: draw from the most likely tokens that reach this probability.
        seed: of the draws.
        cache: layout of the KV cache; a rotating one must hold all tokens.

    Returns:
        The generation, whose `timings.ms_per_token` is per token and not per step, and what the guesses were good for.

    Raises:
        ModelError, TokenError, CapacityError, SamplerError, CacheError: as `generate` and `speculate_tokens`.
        DraftError: the draft does not fit the model.
    """
    watch = Stopwatch()
    sampler = make_sampler(temperature, top_k=top_k, top_p=top_p)
    ending = ending_of(model, None, ())
    rows, request = text_request(model, [prompt], max_new_tokens, sampler, seed, cache, "error", ending, 0)
    chosen_draft = _draft(draft)
    state = begin(model.params, model.config, request, chosen_draft)
    jax.block_until_ready(state)
    prefill_seconds = watch.lap()
    generated, _, speculation = finish(model.params, model.config, request, chosen_draft, state)
    timings = Timings(watch.compile, prefill_seconds, watch.lap(), int(speculation.new_tokens[0]))
    return dataclasses.replace(generation_of(model, rows[0], generated, 0, ending), timings=timings), speculation


def _draft(draft: Literal["lookup"] | Model | Draft) -> Draft:
    if isinstance(draft, Model):
        return DraftModel(draft.params, draft.config)
    if draft == "lookup":
        return PromptLookup()
    if isinstance(draft, str):
        raise DraftError(f"draft: expected 'lookup', a Model or a Draft, got {draft!r}")
    return draft
