"""The compiled programs of decoding: prefill, one step, and a loop of steps.

All of them own the cache that they are given: it is donated, and XLA writes the next one into the same buffers. They
check nothing; `decoding` does.
"""

import dataclasses
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.request import Policy, Request
from llorch_jax.model import run
from llorch_jax.params import Params

Cache = TypeVar("Cache", bound=KVCache)


@struct.dataclass
class DecodeState:
    """What goes from one decode step to the next.

    Attributes:
        token: int32 [B], sampled but not in the cache yet.
        logprob: float32 [B], of `token` under the model, before the sampler's transforms.
        finished: bool [B], rows that have produced an end-of-text id.
        cache: of all tokens before `token`.
        history: `History` of all tokens, `token` included; None where the sampler does not look at it.
        memory: what the sampler remembers between steps.
        top: the most likely alternatives, where they were asked for.
    """

    token: jax.Array
    logprob: jax.Array
    finished: jax.Array
    cache: Any
    history: Any = None
    memory: Any = None
    top: Any = None


@struct.dataclass
class Alternatives:
    """The most likely tokens of a step, most likely first.

    Attributes:
        ids: int32 [..., n].
        logprobs: float32 [..., n], under the model.
    """

    ids: jax.Array
    logprobs: jax.Array


@struct.dataclass
class Generated:
    """New tokens and their log-probabilities.

    Attributes:
        tokens: int32 [B, N].
        logprobs: float32 [B, N].
        top: `Alternatives` [B, N, n], where they were asked for.
    """

    tokens: jax.Array
    logprobs: jax.Array
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
    return _feed(params, config, token, cache, jnp.ones_like(token))


def _feed(
    params: Params, config: GPT2Config, token: jax.Array, cache: Cache, count: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of one more token per row; rows with count 0 are computed but not lengthened."""
    out = run(params, config, token[:, None], cache, count, last=True)
    return out.logits, out.cache


@jax.named_scope("sampling")
def _choose(
    policy: Policy, logits: jax.Array, finished: jax.Array, cache: Cache, history: Any, memory: Any
) -> DecodeState:
    """The state after sampling from logits [B, V]: finished rows get the end-of-text id again."""
    keys = jax.vmap(jax.random.fold_in)(policy.keys, cache.lengths)
    if hasattr(policy.sampler, "sample"):
        token, memory = policy.sampler.sample(logits, keys, history, policy.eos_ids, memory)
    else:
        token = policy.sampler(logits, keys)
    if history is not None:
        history = history.append(token, 1 - finished.astype(jnp.int32))
    if policy.eos_ids.size:
        token = jnp.where(finished, policy.eos_ids[0], token)
        finished = finished | jnp.isin(token, policy.eos_ids)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    top = None
    if policy.top_logprobs:
        values, ids = jax.lax.top_k(logits, policy.top_logprobs)
        top = Alternatives(ids.astype(jnp.int32), values - total[:, None])
    return DecodeState(token, chosen - total, finished, cache, history, memory, top)


def next_state(params: Params, config: GPT2Config, policy: Policy, state: DecodeState) -> DecodeState:
    """One decode step: feed the last token, sample the next."""
    count = 1 - state.finished.astype(jnp.int32)
    logits, cache = _feed(params, config, state.token, state.cache, count)
    return _choose(policy, logits, state.finished, cache, state.history, state.memory)


@partial(jax.jit, donate_argnames="cache")
def first_state(
    policy: Policy, logits: jax.Array, finished: jax.Array, cache: Cache, history: Any = None, memory: Any = None
) -> DecodeState:
    return _choose(policy, logits, finished, cache, history, memory)


@partial(jax.jit, static_argnames="config", donate_argnames=("out", "state"))
def loop(
    params: Params, config: GPT2Config, policy: Policy, out: Generated, state: DecodeState, span: jax.Array
) -> tuple[Generated, DecodeState]:
    """Fills the columns `span[0]` up to `span[1]` of out, or fewer where all rows end before."""

    def unfinished(carry: tuple) -> jax.Array:
        count, _, state = carry
        return (count < span[1]) & ~jnp.all(state.finished)

    def advance(carry: tuple) -> tuple:
        count, out, state = carry
        state = next_state(params, config, policy, state)
        return count + 1, put(out, state, count), state

    _, out, state = jax.lax.while_loop(unfinished, advance, (span[0], out, state))
    return out, state


def first_logits(params: Params, config: GPT2Config, request: Request) -> tuple[jax.Array, KVCache]:
    """The prefill of a prepared request: logits float32 [B, V] of each row's last token, and the cache."""
    cache = request.cache
    return prefill_step(params, config, request.tokens, request.lengths, cache, fresh=cache.is_empty())


def begin(request: Request, logits: jax.Array, cache: KVCache) -> DecodeState:
    """The state with the first token of a prepared request after its prefill."""
    return first_state(request.policy, logits, request.finished, cache, request.history, request.memory)


def with_room(state: DecodeState) -> DecodeState:
    """The state, its cache with room for one more token in every row."""
    return dataclasses.replace(state, cache=state.cache.reserve(1))


def put(out: Generated, state: DecodeState, column: Any) -> Generated:
    """Writes a state's tokens and log-probabilities into one column."""
    new = Generated(state.token, state.logprob, state.top)

    def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
        start = (0, column, *[0] * (buffer.ndim - 2))
        return jax.lax.dynamic_update_slice(buffer, values[:, None], start)

    return jax.tree.map(write, out, new)


def filler(policy: Policy, batch: int, count: int) -> Generated:
    """What stands behind the end of a row."""
    token = policy.eos_ids[0] if policy.eos_ids.size else jnp.int32(0)
    shape, top = (batch, count), None
    if policy.top_logprobs:
        more = (*shape, policy.top_logprobs)
        top = Alternatives(jnp.zeros(more, jnp.int32), jnp.zeros(more, jnp.float32))
    return Generated(jnp.full(shape, token), jnp.zeros(shape, jnp.float32), top)


def compile_count() -> int:
    """How many variants of these programs have been compiled in this process."""
    compiled: tuple[Any, ...] = (prefill_step, decode, first_state, loop)
    return sum(function._cache_size() for function in compiled)
