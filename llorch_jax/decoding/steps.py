"""The compiled programs of decoding: prefill, one step, and a loop of steps.

All of them own the cache that they are given: it is donated, and XLA writes the next one into the same buffers. They
check nothing; `decoding` does.
"""

import dataclasses
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from llorch_jax.cache.base import KVCache
from llorch_jax.cache.placement import pinned, placed
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.params import DecodingParams
from llorch_jax.decoding.request import Request
from llorch_jax.errors import NonFiniteError, SamplerError
from llorch_jax.kernels.logits import logsumexp
from llorch_jax.model import run
from llorch_jax.params import Params

Cache = TypeVar("Cache", bound=KVCache)


@struct.dataclass
class DecodeState:
    """What goes from one decode step to the next.

    Attributes:
        token: int32 [B], the newest of each row, sampled but not in the cache yet; see `check_chosen` for -1.
        logprob: float32 [B], of `token` under the model, before the sampler's transforms; 0 after a row's end.
        finished: bool [B], rows that an end-of-text id has ended, or that could not continue.
        remaining: int32 [B], the number of tokens that each row may still get.
        cache: of all tokens before `token`.
        history: `History` of all tokens, including `token`; None if the sampler does not use it.
        sampler_state: of the sampler.
        top: the most likely alternatives, where they were asked for.
    """

    token: Any
    logprob: Any
    finished: Any
    remaining: Any
    cache: Any
    history: Any = None
    sampler_state: Any = None
    top: Any = None

    @property
    def done(self) -> jax.Array:
        """bool [B], rows that get no more tokens."""
        return self.finished | (self.remaining <= 0)

    def __repr__(self) -> str:
        return f"DecodeState({len(self.finished)} rows, cache {type(self.cache).__name__})"


@struct.dataclass
class Alternatives:
    """The most likely tokens of a step, most likely first.

    Attributes:
        ids: int32 [..., n].
        logprobs: float32 [..., n], under the model.
    """

    ids: Any
    logprobs: Any


@struct.dataclass
class Generated:
    """New tokens and their log-probabilities.

    Attributes:
        tokens: int32 [B, N].
        logprobs: float32 [B, N].
        top: `Alternatives` [B, N, n], where they were asked for.
    """

    tokens: Any
    logprobs: Any
    top: Any = None


@partial(jax.jit, static_argnames=("config", "fresh"), donate_argnames="cache")
def prefill_step(
    params: Params, config: GPT2Config, tokens: jax.Array, lengths: jax.Array, cache: Cache, *, fresh: bool
) -> tuple[jax.Array, Cache]:
    """Logits of each row's last token; `fresh` says that the cache is empty."""
    out = run(params, config, tokens, cache, lengths, last=True, fresh=fresh)
    return out.logits, out.cache


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode(params: Params, config: GPT2Config, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of one more token per row."""
    return _feed(params, config, token, cache, jnp.ones_like(token))


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def feed_active(
    params: Params, config: GPT2Config, token: jax.Array, cache: Cache, active: jax.Array
) -> tuple[jax.Array, Cache]:
    """`decode` for the rows where `active` bool [B]; the others stay as they are."""
    return _feed(params, config, token, cache, active.astype(jnp.int32))


def _feed(
    params: Params, config: GPT2Config, token: jax.Array, cache: Cache, count: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of one more token per row; rows with count 0 are computed but not lengthened."""
    out = run(params, config, token[:, None], cache, count, last=True)
    return out.logits, out.cache


@jax.named_scope("sampling")
def choose(decoding: DecodingParams, logits: jax.Array, before: DecodeState, positions: jax.Array) -> DecodeState:
    """The state after sampling a token of every row, in `jit`.

    Rows that are done keep their token, or get filler where there is none before. A row whose logits are not numbers,
    or in which no token is allowed, finishes with a log-probability that is NaN, and the host reports it: see
    `check_chosen`.

    Args:
        decoding: how tokens are chosen.
        logits: float32 [B, V].
        before: the state of the tokens before, with the cache that the logits come from.
        positions: int32 [B], of the tokens to be chosen.
    """
    sampler = decoding.sampler
    keys = jax.vmap(jax.random.fold_in)(decoding.keys, positions)
    history = before.history if sampler.needs_history else None
    token, sampler_state = sampler.sample(logits, keys, history, decoding.eos_ids, before.sampler_state)
    done = before.done
    going = 1 - done.astype(jnp.int32)
    token = jnp.where(done, decoding.filler if before.token is None else before.token, token)
    logprob = logprobs_of(logits, jnp.maximum(token, 0))
    logprob = jnp.where(done, 0.0, jnp.where(token < 0, jnp.nan, logprob))
    return DecodeState(
        token=token,
        logprob=logprob,
        finished=before.finished | (~done & (decoding.ends(token) | jnp.isnan(logprob))),
        remaining=before.remaining - going,
        cache=before.cache,
        history=None if before.history is None else before.history.append(token, going),
        sampler_state=sampler_state,
        top=alternatives(logits, decoding.top_logprobs) if decoding.top_logprobs else None,
    )


def logprobs_of(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The natural log-probabilities float32 [...] of ids [...], given logits float32 [..., V]."""
    return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - logsumexp(logits)


def alternatives(logits: jax.Array, count: int) -> Alternatives:
    """The `count` most likely ids, the most likely first, given logits float32 [B, V]."""
    values, ids = jax.lax.top_k(logits, count)
    return Alternatives(ids.astype(jnp.int32), values - logsumexp(logits)[:, None])


def next_state(params: Params, config: GPT2Config, decoding: DecodingParams, state: DecodeState) -> DecodeState:
    """One decode step: feed the last token, sample the next."""
    logits, cache = _feed(params, config, state.token, state.cache, 1 - state.done.astype(jnp.int32))
    return choose(decoding, logits, dataclasses.replace(state, cache=cache), cache.lengths)


@partial(jax.jit, static_argnames="mesh", donate_argnames="cache")
def first_state(
    decoding: DecodingParams,
    logits: jax.Array,
    finished: Any,
    remaining: Any,
    cache: Cache,
    history: Any = None,
    sampler_state: Any = None,
    *,
    mesh: Mesh | None = None,
) -> DecodeState:
    """The state after sampling from logits [B, V] that a pass outside the loop has computed."""
    before = DecodeState(None, None, finished, remaining, cache, history, sampler_state)
    return pinned(mesh, choose(decoding, logits, before, cache.lengths))


@partial(jax.jit, static_argnames="config", donate_argnames=("out", "state"))
def loop(
    params: Params, config: GPT2Config, decoding: DecodingParams, out: Generated, state: DecodeState, span: jax.Array
) -> tuple[Generated, DecodeState]:
    """Fills the columns `span[0]` up to `span[1]` of out, or fewer where all rows are done before."""

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        count, _, state = carry
        return (count < span[1]) & ~jnp.all(state.done)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, out, before = carry
        state = next_state(params, config, decoding, before)
        shown = jnp.where(before.done, decoding.filler, state.token)
        return count + 1, put(out, state, shown, count), state

    _, out, state = jax.lax.while_loop(unfinished, step, (span[0], out, state))
    return pinned(params.mesh, (out, state))


def start(params: Params, config: GPT2Config, request: Request) -> DecodeState:
    """The state of a prepared request after its prefill, with the first token of every row."""
    return begin(request, *first_logits(params, config, request))


def first_logits(params: Params, config: GPT2Config, request: Request) -> tuple[jax.Array, KVCache]:
    """The prefill of a prepared request: logits float32 [B, V] of each row's last token, and the cache."""
    cache = placed(params.mesh, request.cache)
    return prefill_step(params, config, request.tokens, request.lengths, cache, fresh=cache.is_empty())


def begin(request: Request, logits: jax.Array, cache: KVCache) -> DecodeState:
    """The state with the first token of a prepared request after its prefill."""
    return first_state(
        request.decoding,
        logits,
        request.finished,
        request.remaining,
        cache,
        request.history,
        request.sampler_state,
        mesh=request.mesh,
    )


def with_room(params: Params, state: DecodeState) -> tuple[DecodeState, int]:
    """The state, its cache with room for more tokens in the rows that are not done, and the number of steps it allows.

    Rows that are done need no room: their context may be full.
    """
    active = ~done_on_host(state)
    if not active.any():
        return state, 1
    cache = placed(params.mesh, state.cache.reserve(active.astype(np.int32)))
    return dataclasses.replace(state, cache=cache), cache.room(active)


def done_on_host(state: DecodeState) -> np.ndarray:
    """`state.done` by NumPy; waits for the state."""
    return np.asarray(state.finished) | (np.asarray(state.remaining) <= 0)


def put(out: Generated, state: DecodeState, token: jax.Array, column: Any) -> Generated:
    """Writes tokens int32 [B], those of a state or filler, and its log-probabilities into one column."""
    new = Generated(token, state.logprob, state.top)

    def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
        start = (0, column, *[0] * (buffer.ndim - 2))
        return jax.lax.dynamic_update_slice(buffer, values[:, None], start)

    return jax.tree.map(write, out, new)


def filler(decoding: DecodingParams, count: int) -> Generated:
    """`count` columns of what stands after the end of a row."""
    token = decoding.filler
    shape, top = (token.shape[0], count), None
    if decoding.top_logprobs:
        more = (*shape, decoding.top_logprobs)
        top = Alternatives(jnp.zeros(more, jnp.int32), jnp.zeros(more, jnp.float32))
    return Generated(jnp.broadcast_to(token[:, None], shape), jnp.zeros(shape, jnp.float32), top)


def check_chosen(tokens: np.ndarray, logprobs: np.ndarray) -> None:
    """Raises an error if a row could not continue; host only.

    Args:
        tokens: int32 [B, N], -1 where the sampler allowed none.
        logprobs: float32 [B, N], NaN where a row could not continue.

    Raises:
        SamplerError: the settings of the sampler ban every token.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    failed = np.argwhere(np.isnan(logprobs))
    if not len(failed):
        return
    row, column = failed[0]
    if tokens[row, column] < 0:
        raise SamplerError(f"sampler: expected settings that allow a token, got none for row {row}: all are banned")
    raise NonFiniteError(f"logits: expected finite numbers, got NaN or infinity in row {row}; check the weights")


def compile_count() -> int:
    """How many variants of these programs have been compiled in this process."""
    compiled: tuple[Any, ...] = (prefill_step, decode, feed_active, first_state, loop)
    return sum(function._cache_size() for function in compiled)
