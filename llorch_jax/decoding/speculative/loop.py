"""Speculative decoding: a draft guesses several tokens, one forward pass of the model checks them all.

Exact, after Leviathan et al. 2023 (2211.17192): what comes out has the distribution of plain decoding, whether the
draft is good or bad; only the speed depends on it. Guesses that are a function of the text before them (prompt lookup,
greedy or coupled draft models) are accepted as long as they are what the sampler, with the key of their position,
chooses itself: the tokens are those of `generate_tokens`. For guesses drawn from a draft model's distribution the
paper's rejection sampling is used.
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
from llorch_jax.cache.placement import pinned, placed
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.params import DecodingParams, EosIds
from llorch_jax.decoding.request import Request, prepare
from llorch_jax.decoding.speculative.drafts import Context, Draft, PromptLookup
from llorch_jax.decoding.speculative.verification import Verdict, match, reject
from llorch_jax.decoding.steps import DecodeState, Generated, check_chosen, done_on_host, start
from llorch_jax.errors import CacheError, DraftError
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.sampling import History, KnowsProbabilities, Sampler
from llorch_jax.tracing import is_concrete


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How useful the guesses were.

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
        """The fraction of all rows' guesses that were accepted; 0 if there were none."""
        return float(np.sum(self.accepted) / max(np.sum(self.proposed), 1))

    @property
    def tokens_per_step(self) -> float:
        """New tokens of the longest row per forward pass; 1 in plain decoding."""
        return float((np.max(self.new_tokens) - 1) / max(self.steps, 1))


@struct.dataclass
class SpeculativeState:
    """What goes from one verify step to the next.

    Attributes:
        decode: of decoding; its history has the prompt and the new tokens of each row, whatever the sampler.
        logprobs: float32 [B, S], of the new tokens under the model, at their places in the history.
        draft_state: of the draft.
        proposed: int32 [B], guesses so far.
        accepted: int32 [B], accepted ones.
        steps: int32 [], verify steps so far.
    """

    decode: DecodeState
    logprobs: jax.Array
    draft_state: Any
    proposed: jax.Array
    accepted: jax.Array
    steps: jax.Array


def speculate_tokens(
    params: Params,
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int | Sequence[int] = 32,
    draft: Draft | None = None,
    cache: KVCache | None = None,
    lengths: Any = None,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    eos_id: EosIds = "config",
) -> tuple[jax.Array, KVCache, Speculation]:
    """`generate_tokens` by speculative decoding. Not inside your own `jit`.

    With `Greedy`, and with any sampler where the draft is `PromptLookup` or a `DraftModel` with `coupled=True`, the
    tokens are those of `generate_tokens` with the same arguments, as far as float32 goes: the pass over several tokens
    is another compiled program than that over one, and its logits can differ in the last digit, which matters where two
    tokens are as good as equal. With other `DraftModel`s and random samplers the distribution is the same, the tokens
    drawn are not.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        prompt_tokens: int32 [B, T]; rows shorter than T are padded on the right with any id.
        max_new_tokens: maximum number of new tokens of each row, one number or a sequence of B, 1 or more.
        draft: where the guesses come from; `PromptLookup()` by default. It sees the tokens given here only, not those
            that the cache holds already.
        cache: to append to, donated; None makes a `StaticCache` of the size needed. A `RotatingCache` or
            `EvictingCache` must be able to hold all tokens, as neither can restore tokens that were replaced.
            A `QuantizedCache` rounds some tokens earlier than in plain decoding, so that the tokens may differ.
        lengths: int32 [B], number of real prompt tokens in each row; None means all T.
        sampler: `Greedy()` by default; any, with its penalties and state. A `DraftModel` that is not coupled needs one
            that `KnowsProbabilities`, whatever came before.
        key: as in `generate_tokens`.
        eos_id: as in `generate_tokens`.

    Returns:
        int32 [B, N], filled up after a row's end, as in `generate_tokens`; the cache, which holds the prompt and all
        new tokens of a row but its last; and how useful the guesses were.

    Raises:
        TokenError, CapacityError, SamplerError, NonFiniteError: as `generate_tokens`.
        CacheError: the cache cannot undo rejected guesses: a ring or a budget that does not hold all tokens, or an
            eviction policy that lets queries vote.
        DraftError: the draft does not fit the model, or one of its settings is invalid.
    """
    draft = PromptLookup() if draft is None else draft
    request = prepare(config, prompt_tokens, max_new_tokens, cache, lengths, sampler, key, eos_id, mesh=params.mesh)
    state = begin(params, config, request, draft)
    generated, cache_after, speculation = finish(params, config, request, draft, state)
    return generated.tokens, cache_after, speculation


def begin(params: Params, config: GPT2Config, request: Request, draft: Draft) -> SpeculativeState:
    """The state of a prepared request after the prefill, with the first new token.

    Raises:
        CacheError, DraftError: as `speculate_tokens`.
    """
    _check(request, draft)
    draft = placed(params.mesh, draft)
    batch, columns = request.tokens.shape
    draft_state = draft.init(config, request.tokens, request.lengths, request.remaining)
    history = request.history
    if history is None:
        history = History.of(request.tokens, request.lengths, bucket(columns + request.max_new_tokens))
    state = start(params, config, dataclasses.replace(request, history=history))
    logprobs = np.zeros(history.tokens.shape, np.float32)
    logprobs[np.arange(batch), request.lengths] = np.asarray(state.logprob)
    nothing = np.zeros(batch, np.int32)
    return SpeculativeState(
        decode=dataclasses.replace(state, top=None),
        logprobs=jax.device_put(logprobs),
        draft_state=draft_state,
        proposed=jax.device_put(nothing),
        accepted=jax.device_put(nothing.copy()),  # a copy, as the loop donates both
        steps=jnp.int32(0),
    )


def finish(
    params: Params, config: GPT2Config, request: Request, draft: Draft, state: SpeculativeState
) -> tuple[Generated, KVCache, Speculation]:
    """Tokens and log-probabilities [B, N] of a request begun, the cache, and how useful the guesses were."""
    decoding = dataclasses.replace(request.decoding, top_logprobs=0)
    draft = placed(params.mesh, draft)
    while not (done := done_on_host(state.decode)).all():
        wanted = np.minimum(draft.length + 1, np.asarray(state.decode.remaining))
        cache = placed(params.mesh, state.decode.cache.reserve(np.where(done, 0, wanted)))
        room = cache.room(~done)
        limits = jnp.asarray(np.asarray(cache.lengths) + room, jnp.int32)
        state = dataclasses.replace(state, decode=dataclasses.replace(state.decode, cache=cache))
        state = _loop(params, config, decoding, draft, state, limits)
    return _generated(request, state), state.decode.cache, _speculation(request, state)


def _check(request: Request, draft: Draft) -> None:
    cache, sampler = request.cache, request.decoding.sampler
    if isinstance(draft, type) or not isinstance(draft, Draft):
        raise DraftError(f"draft: expected PromptLookup(), a DraftModel or another Draft, got {type(draft).__name__}")
    if not is_concrete(request.tokens, request.lengths, cache):
        raise DraftError("speculative decoding: expected a call outside jit, got traced arrays")
    plain = isinstance(sampler, KnowsProbabilities) and sampler.is_plain
    if sampler.needs_key and draft.draws and not plain:
        raise DraftError(
            f"sampler: expected one whose method `filtered` says all about its draws, got a {type(sampler).__name__} "
            "that has none or looks at more than the logits; use a draft with coupled=True"
        )
    count = np.asarray(request.lengths) + request.remaining - 1
    if not cache.can_roll_back(count):
        longest = int(np.max(np.asarray(cache.lengths) + count))
        raise CacheError(
            f"cache: expected one that can take back rejected guesses, got a {type(cache).__name__} that forgets "
            f"tokens or counts votes before it holds {longest} of them"
        )


def _needed(draft: Draft, state: DecodeState) -> jax.Array:
    """int32 [B], the maximum number of tokens that the next step writes into each row."""
    return jnp.where(state.done, 0, jnp.minimum(draft.length + 1, state.remaining))


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _loop(
    params: Params,
    config: GPT2Config,
    decoding: DecodingParams,
    draft: Draft,
    state: SpeculativeState,
    limits: jax.Array,
) -> SpeculativeState:
    """One verify step, and more until all rows are done or the next could exceed `limits` int32 [B] tokens."""
    first = state.steps

    def unfinished(state: SpeculativeState) -> jax.Array:
        fits = jnp.all(state.decode.cache.lengths + _needed(draft, state.decode) <= limits)
        return ~jnp.all(state.decode.done) & (fits | (state.steps == first))

    after = jax.lax.while_loop(unfinished, partial(_verify_step, params, config, decoding, draft), state)
    return pinned(params.mesh, after)


def _verify_step(
    params: Params, config: GPT2Config, decoding: DecodingParams, draft: Draft, state: SpeculativeState
) -> SpeculativeState:
    """Feeds the last token and the guesses after it, and keeps those that the model agrees with and one more."""
    before = state.decode
    lengths = before.cache.lengths
    first = lengths + 1
    proposal = draft.propose(state.draft_state, Context(before, first, decoding))
    feeding = jnp.where(before.done, 0, jnp.minimum(proposal.count + 1, before.remaining))
    proposal = proposal.replace(count=feeding - 1)  # type: ignore[attr-defined]
    tokens = jnp.concatenate([before.token[:, None], proposal.tokens], axis=1)
    out = run(params, config, tokens, before.cache, feeding)
    judge = match if proposal.logits is None else reject
    verdict = judge(decoding, before, first, out.logits, proposal)
    return SpeculativeState(
        decode=dataclasses.replace(verdict.state, cache=out.cache.crop(lengths + verdict.new)),
        logprobs=_written(state, verdict),
        draft_state=draft.rollback(proposal.state, verdict.state.history.lengths),
        proposed=state.proposed + jnp.maximum(proposal.count, 0),
        accepted=state.accepted + verdict.accepted,
        steps=state.steps + 1,
    )


def _written(state: SpeculativeState, verdict: Verdict) -> jax.Array:
    """The log-probabilities with those of the new tokens."""
    known = state.decode.history.lengths[:, None]
    columns = jnp.arange(verdict.tokens.shape[1], dtype=jnp.int32)[None]
    places = jnp.where(columns < verdict.new[:, None], known + columns, state.logprobs.shape[1])
    rows = jnp.arange(known.shape[0])[:, None]
    return state.logprobs.at[rows, places].set(verdict.logprobs, mode="drop")


def _generated(request: Request, state: SpeculativeState) -> Generated:
    """The new tokens [B, N], filled up after the rows' ends."""
    history = state.decode.history
    columns = np.arange(np.max(request.remaining))[None]
    places = np.asarray(request.lengths)[:, None] + columns
    there = places < np.asarray(history.lengths)[:, None]
    places = np.minimum(places, history.tokens.shape[1] - 1)
    tokens = np.take_along_axis(np.asarray(history.tokens), places, axis=1)
    logprobs = np.take_along_axis(np.asarray(state.logprobs), places, axis=1)
    logprobs = np.where(there, logprobs, np.float32(0))
    check_chosen(tokens, logprobs)
    tokens = np.where(there, tokens, request.decoding.filler_on_host()[:, None])
    return Generated(*jax.device_put((tokens, logprobs)))


def _speculation(request: Request, state: SpeculativeState) -> Speculation:
    known = np.asarray(state.decode.history.lengths) - np.asarray(request.lengths)
    return Speculation(np.array(state.proposed), np.array(state.accepted), int(state.steps), known)
