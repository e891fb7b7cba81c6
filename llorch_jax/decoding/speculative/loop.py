"""Speculative decoding: a draft guesses several tokens, one forward pass of the model checks them all.

Exact, after Leviathan et al. 2023 (2211.17192): what comes out has the distribution of plain decoding, be the draft
good or bad; only the speed depends on it. Guesses that are a function of the text before them (prompt lookup, greedy or
coupled draft models) are accepted as long as they are what the sampler, with the key of their position, chooses
itself: the tokens are those of `generate_tokens`. For guesses drawn from a draft model's distribution the paper's
rejection sampling is used.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.request import Policy, Request, prepare
from llorch_jax.decoding.speculative.drafts import Context, Draft, PromptLookup
from llorch_jax.decoding.speculative.verification import match, reject
from llorch_jax.decoding.steps import Generated, first_logits, first_state
from llorch_jax.errors import CacheError, DraftError
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.sampling import Sampler
from llorch_jax.tracing import is_concrete


@dataclasses.dataclass(frozen=True)
class Speculation:
    """What the guesses were good for.

    Attributes:
        proposed: int [B], guesses that were checked for each row.
        accepted: int [B], how many of them became part of the text.
        steps: forward passes of the model after the prefill; all rows share them.
        new_tokens: int [B], tokens per row, the prefill's and an end-of-text token included.
    """

    proposed: np.ndarray
    accepted: np.ndarray
    steps: int
    new_tokens: np.ndarray

    @property
    def acceptance_rate(self) -> float:
        """Accepted guesses over guesses, of all rows; 0 where there were none."""
        return float(np.sum(self.accepted) / max(np.sum(self.proposed), 1))

    @property
    def tokens_per_step(self) -> float:
        """New tokens of the longest row per forward pass; plain decoding has 1."""
        return float((np.max(self.new_tokens) - 1) / max(self.steps, 1))


@struct.dataclass
class SpeculativeState:
    """What goes from one verify step to the next.

    Attributes:
        history: int32 [B, S], the prompt and the new tokens of each row.
        logprobs: float32 [B, S], of the new tokens under the model.
        known: int32 [B], tokens in a row of the history; the last of them is not in the cache yet.
        goal: int32 [B], where a row is complete.
        finished: bool [B].
        cache: the model's.
        memory: the draft's.
        proposed: int32 [B], guesses so far.
        accepted: int32 [B], accepted ones.
        steps: int32 [], verify steps so far.
    """

    history: jax.Array
    logprobs: jax.Array
    known: jax.Array
    goal: jax.Array
    finished: jax.Array
    cache: Any
    memory: Any
    proposed: jax.Array
    accepted: jax.Array
    steps: jax.Array


def speculate_tokens(
    params: Params,
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int = 32,
    draft: Draft | None = None,
    cache: KVCache | None = None,
    lengths: Any = None,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
) -> tuple[jax.Array, KVCache, Speculation]:
    """`generate_tokens` by speculative decoding. Not inside your own `jit`.

    With `Greedy`, and with any sampler where the draft is `PromptLookup` or a `DraftModel` with `coupled=True`, the
    tokens are those of `generate_tokens` with the same arguments, as far as float32 goes: the pass over several tokens
    is another compiled program than that over one, and its logits can differ in the last digit, which matters where two
    tokens are as good as equal. With other `DraftModel`s and random samplers the distribution is the same, the tokens
    drawn are not.

    Args:
        params: of a model of this configuration.
        config: the model's hyperparameters.
        prompt_tokens: int32 [B, T]; rows shorter than T are padded on the right with any id.
        max_new_tokens: how many tokens each row gets at most, 1 or more.
        draft: where the guesses come from; `PromptLookup()` by default. It sees the tokens given here only, not those
            that the cache holds already.
        cache: to append to, donated; None makes a `StaticCache` of the size needed. A `RotatingCache` or
            `EvictingCache` must be able to hold all tokens, as neither can take back what has replaced older tokens.
            A `QuantizedCache` rounds some tokens earlier than in plain decoding, so that the tokens may differ.
        lengths: int32 [B], how many prompt tokens of each row are real; None means all T.
        sampler: `Greedy()` by default. A `DraftModel` that is not coupled needs a `filtered` method of it.
        key: as in `generate_tokens`.
        eos_id: id or ids that end a row.

    Returns:
        int32 [B, max_new_tokens], filled up with the (first) end-of-text id behind a row's end; the cache, which holds
        the prompt and all new tokens of a row but its last; and what the guesses were good for.

    Raises:
        TokenError, CapacityError, SamplerError: as `generate_tokens`.
        CacheError: the cache cannot take back rejected guesses: a ring or a budget that does not hold all tokens, or an
            eviction policy that lets queries vote.
        DraftError: the draft does not fit the model, or a setting of it is impossible.
    """
    draft = PromptLookup() if draft is None else draft
    request = prepare(config, prompt_tokens, max_new_tokens, cache, lengths, sampler, key, eos_id)
    state = begin(params, config, request, draft)
    generated, cache_after, speculation = finish(params, config, request, draft, state)
    return generated.tokens, cache_after, speculation


def begin(params: Params, config: GPT2Config, request: Request, draft: Draft) -> SpeculativeState:
    """The state of a prepared request after the prefill, with the first new token.

    Raises:
        CacheError, DraftError: as `speculate_tokens`.
    """
    _check(request, draft)
    memory = draft.start(config, request.tokens, request.lengths, request.max_new_tokens)
    logits, cache = first_logits(params, config, request)
    state = first_state(request.policy, logits, request.finished, cache)
    batch, columns = request.tokens.shape
    lengths, rows = np.asarray(request.lengths), np.arange(batch)
    nothing = np.zeros(batch, np.int32)
    history = np.zeros((batch, bucket(columns + request.max_new_tokens)), np.int32)
    history[:, :columns] = np.asarray(request.tokens)
    logprobs = np.zeros(history.shape, np.float32)
    history[rows, lengths], logprobs[rows, lengths] = np.asarray(state.token), np.asarray(state.logprob)
    return SpeculativeState(
        history=jax.device_put(history),
        logprobs=jax.device_put(logprobs),
        known=jax.device_put(lengths + 1),
        goal=jax.device_put(lengths + request.max_new_tokens),
        finished=state.finished | (request.max_new_tokens == 1),
        cache=state.cache,
        memory=memory,
        proposed=jax.device_put(nothing),
        accepted=jax.device_put(nothing.copy()),  # of its own: the loop donates both
        steps=jnp.int32(0),
    )


def finish(
    params: Params, config: GPT2Config, request: Request, draft: Draft, state: SpeculativeState
) -> tuple[Generated, KVCache, Speculation]:
    """Tokens and log-probabilities [B, N] of a request begun, the cache, and what the guesses were good for."""
    while not np.all(state.finished):
        cache = state.cache.reserve(np.asarray(_needed(draft, state)))
        limits = jnp.asarray(np.asarray(cache.lengths) + cache.room(), jnp.int32)
        state = _loop(params, config, request.policy, draft, dataclasses.replace(state, cache=cache), limits)
    return _generated(request, state), state.cache, _speculation(request, state)


def _check(request: Request, draft: Draft) -> None:
    cache = request.cache
    if not is_concrete(request.tokens, request.lengths, cache):
        raise DraftError("speculative decoding: expected a call outside jit, got traced arrays")
    if not request.policy.sampler.needs_key or getattr(draft, "coupled", True):
        pass
    elif not getattr(request.policy.sampler, "is_plain", hasattr(request.policy.sampler, "filtered")):
        name = type(request.policy.sampler).__name__
        raise DraftError(
            f"sampler: expected one whose method `filtered` says all about its draws, got a {name} that has none or "
            "looks at more than the logits; use a draft with coupled=True"
        )
    count = np.asarray(request.lengths) + request.max_new_tokens - 1
    if not cache.can_roll_back(count):
        longest = int(np.max(np.asarray(cache.lengths) + count))
        raise CacheError(
            f"cache: expected one that can take back rejected guesses, got a {type(cache).__name__} that forgets "
            f"tokens or counts votes before it holds {longest} of them"
        )


def _needed(draft: Draft, state: SpeculativeState) -> jax.Array:
    """int32 [B], how many tokens the next step writes into each row at most."""
    return jnp.where(state.finished, 0, jnp.minimum(draft.length + 1, state.goal - state.known))


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _loop(
    params: Params, config: GPT2Config, policy: Policy, draft: Draft, state: SpeculativeState, limits: jax.Array
) -> SpeculativeState:
    """One verify step, and more until all rows are finished or the next could exceed `limits` int32 [B] tokens."""
    start = state.steps

    def unfinished(state: SpeculativeState) -> jax.Array:
        fits = jnp.all(state.cache.lengths + _needed(draft, state) <= limits)
        return ~jnp.all(state.finished) & (fits | (state.steps == start))

    return jax.lax.while_loop(unfinished, partial(_verify_step, params, config, policy, draft), state)


def _verify_step(
    params: Params, config: GPT2Config, policy: Policy, draft: Draft, state: SpeculativeState
) -> SpeculativeState:
    """Feeds the last token and the guesses behind it, and keeps those that the model agrees with and one more."""
    lengths = state.cache.lengths
    context = Context(state.history, state.known, lengths + 1, policy)
    proposal = draft.propose(state.memory, context)
    feeding = jnp.where(state.finished, 0, jnp.minimum(proposal.count + 1, state.goal - state.known))
    proposal = proposal.replace(count=feeding - 1)  # type: ignore[attr-defined]
    last = jnp.take_along_axis(state.history, state.known[:, None] - 1, axis=1)
    tokens = jnp.concatenate([last, proposal.tokens], axis=1)
    out = run(params, config, tokens, state.cache, feeding)
    logits = out.logits
    judge = match if proposal.logits is None else reject
    chosen, accepted = judge(policy, context.first, logits, proposal)
    new = _until_end(policy, chosen, jnp.where(state.finished, 0, accepted + 1))
    known = state.known + new
    return dataclasses.replace(
        state,
        **_written(state, chosen, logits, new),
        known=known,
        finished=state.finished | (known == state.goal) | _ended(policy, chosen, new),
        cache=out.cache.crop(lengths + new),
        memory=draft.rollback(proposal.memory, known),
        proposed=state.proposed + jnp.maximum(proposal.count, 0),
        accepted=state.accepted + jnp.minimum(accepted, new),
        steps=state.steps + 1,
    )


def _until_end(policy: Policy, chosen: jax.Array, new: jax.Array) -> jax.Array:
    """int32 [B], how many of the `new` tokens [B] in chosen [B, D + 1] there are up to an end-of-text id."""
    if not policy.eos_ids.size:
        return new
    ends = jnp.isin(chosen, policy.eos_ids)
    return jnp.where(jnp.any(ends, axis=1), jnp.minimum(new, jnp.argmax(ends, axis=1).astype(jnp.int32) + 1), new)


def _ended(policy: Policy, chosen: jax.Array, new: jax.Array) -> jax.Array:
    """bool [B], whether the last of the `new` tokens [B] in chosen [B, D + 1] is an end-of-text id."""
    if not policy.eos_ids.size:
        return jnp.zeros(new.shape, bool)
    last = jnp.take_along_axis(chosen, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0]
    return (new > 0) & jnp.isin(last, policy.eos_ids)


def _written(state: SpeculativeState, chosen: jax.Array, logits: jax.Array, new: jax.Array) -> dict[str, jax.Array]:
    """History and log-probabilities with the first `new` int32 [B] of the tokens chosen [B, D + 1]."""
    columns = jnp.arange(chosen.shape[1], dtype=jnp.int32)[None]
    places = jnp.where(columns < new[:, None], state.known[:, None] + columns, state.history.shape[1])
    rows = jnp.arange(chosen.shape[0])[:, None]
    picked = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    logprobs = picked - jax.nn.logsumexp(logits, axis=-1)
    return {
        "history": state.history.at[rows, places].set(chosen, mode="drop"),
        "logprobs": state.logprobs.at[rows, places].set(logprobs, mode="drop"),
    }


def _generated(request: Request, state: SpeculativeState) -> Generated:
    """The new tokens [B, N], filled up behind the rows' ends."""
    eos_ids = np.asarray(request.policy.eos_ids)
    columns = np.arange(request.max_new_tokens)[None]
    places = np.asarray(request.lengths)[:, None] + columns
    there = places < np.asarray(state.known)[:, None]
    tokens, logprobs = (np.take_along_axis(np.asarray(x), places, axis=1) for x in (state.history, state.logprobs))
    filler = eos_ids[0] if eos_ids.size else 0
    return Generated(*jax.device_put((np.where(there, tokens, filler), np.where(there, logprobs, np.float32(0)))))


def _speculation(request: Request, state: SpeculativeState) -> Speculation:
    proposed, accepted, known = (np.array(x) for x in (state.proposed, state.accepted, state.known))
    return Speculation(proposed, accepted, int(state.steps), known - np.asarray(request.lengths))
