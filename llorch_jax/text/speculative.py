"""Text in, text out, by speculative decoding."""

from typing import Any, Literal, overload

import jax

from llorch_jax.decoding.speculative.drafts import Draft, DraftModel, PromptLookup
from llorch_jax.decoding.speculative.loop import Speculation, begin, finish
from llorch_jax.errors import DraftError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.collecting import collect, steps_of
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.prompts import make_batch, prompt_list
from llorch_jax.text.results import Generation
from llorch_jax.text.timing import Stopwatch

Drafting = Literal["lookup"] | Model | Draft


@overload
def generate_speculative(
    model: Model, prompt: str, max_new_tokens: int = ..., *, draft: Drafting = ..., **options: Any
) -> tuple[Generation, Speculation]: ...
@overload
def generate_speculative(
    model: Model, prompt: list[str], max_new_tokens: int = ..., *, draft: Drafting = ..., **options: Any
) -> tuple[list[Generation], Speculation]: ...
def generate_speculative(
    model: Model, prompt: str | list[str], max_new_tokens: int = 64, *, draft: Drafting = "lookup", **options: Any
) -> tuple[Generation | list[Generation], Speculation]:
    """Continues prompts as `generate` does, by speculative decoding; see `speculate_tokens` for what is exact.

    Args:
        model: from `load`.
        prompt: the text to continue, or several, which then run as one batch.
        max_new_tokens: maximum number of new tokens of each.
        draft: "lookup" for `PromptLookup()`, a smaller model with the same vocabulary, or a `Draft` with settings.
        options: as in `generate`; see docs/options.md for those that apply. A rotating cache must hold all tokens.

    Returns:
        The generation, or a list of them if `prompt` is a list, and how useful the guesses were. Its
        `timings.ms_per_token` is per token and not per step.

    Raises:
        ModelError, TokenError, CapacityError, SamplerError, CacheError, OptionError: as `generate` and
            `speculate_tokens`.
        DraftError: the draft does not fit the model.
    """
    watch = Stopwatch()
    guesses = _draft(draft)
    checked = GenerationOptions.create(max_new_tokens=max_new_tokens, **options)
    batch = make_batch(model, prompt_list(prompt), checked, "speculative decoding")
    state = begin(model.params, model.config, batch.request, guesses)
    jax.block_until_ready(state)
    prefill_seconds = watch.lap()
    generated, _, speculation = finish(model.params, model.config, batch.request, guesses, state)
    outputs = collect(steps_of(generated, batch.eos_ids), batch.rows, watch, prefill_seconds)
    return outputs[0] if isinstance(prompt, str) else outputs, speculation


def _draft(draft: Drafting) -> Draft:
    if isinstance(draft, Model):
        return DraftModel(draft.params, draft.config)
    if isinstance(draft, str) and draft == "lookup":
        return PromptLookup()
    if isinstance(draft, str) or not isinstance(draft, Draft):
        shown = repr(draft)[:80] if isinstance(draft, str) else f"a {type(draft).__name__}"
        raise DraftError(f"draft: expected 'lookup', a Model or a Draft, got {shown}")
    return draft
