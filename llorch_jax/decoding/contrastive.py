"""Contrastive search: a likely token whose hidden state is unlike those before it."""

import dataclasses
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
from llorch_jax.decoding.branching import check_numbers, check_real, check_untraced, count_ids, feed, span
from llorch_jax.decoding.params import DecodingParams, EosIds
from llorch_jax.decoding.request import Request, prepare
from llorch_jax.errors import CapacityError, SearchError
from llorch_jax.linear import EXACT
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.sampling.masking import only_allowed
from llorch_jax.tracing import whole


@struct.dataclass
class _State:
    """What goes from one step to the next.

    Attributes:
        tokens: int32 [B, N], new ones.
        count: int32 [], how many there are.
        ids: int32 [B, C], candidates for the next token.
        probabilities: float32 [B, C], of the candidates.
        seen: float32 [B, S, D], hidden states of the tokens so far, scaled to length 1.
        known: int32 [B], how many of them there are.
        finished: bool [B].
        cache: of B * C rows; the rows of one text are identical.
        allowed: int32 [1, ceil(V / 32)], bits of the ids that may be chosen; None for all.
    """

    tokens: jax.Array
    count: jax.Array
    ids: jax.Array
    probabilities: jax.Array
    seen: jax.Array
    known: jax.Array
    finished: jax.Array
    cache: Any
    allowed: jax.Array | None = None


def contrastive_search(
    params: Params,
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int = 32,
    *,
    top_k: int = 4,
    penalty_alpha: float = 0.6,
    eos_id: EosIds = "config",
    cache: KVCache | None = None,
    lengths: Any = None,
    allowed: Any = None,
) -> tuple[jax.Array, KVCache]:
    """Continues a batch of prompts by contrastive search (Su et al. 2022, 2202.06417, section 3.2).

    Of the `top_k` most likely tokens it takes the one with the greatest (1 - a) * probability - a * s, where a is
    `penalty_alpha` and s the largest cosine similarity of the token's final hidden state with that of any token before
    it. It is deterministic. Not inside your own `jit`.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        prompt_tokens: int32 [B, T]; rows shorter than T are padded on the right with any id.
        max_new_tokens: maximum number of new tokens of each row, 1 or more.
        top_k: candidates per step, 1 or more; a step runs this many rows per text.
        penalty_alpha: from 0, which is greedy decoding, to 1.
        eos_id: as in `generate_tokens`.
        cache: of B rows, to append the prompts to, donated; None makes a `StaticCache`. Its rows are forked after the
            prefill; a `PagedCache` needs pages for that, and a step on the host for every token. New tokens are not
            compared with those that it holds already.
        lengths: int32 [B], number of real prompt tokens in each row; None means all T.
        allowed: bits int32 [1, ceil(V / 32)], the lowest first, of the ids that may be chosen; None for all.

    Returns:
        int32 [B, max_new_tokens], filled up with the row's (first) end-of-text id, or 0, after its end; and the cache
        of B rows, which holds the prompt and all new tokens.

    Raises:
        TokenError, CapacityError: as `prefill`; the prompt and all new tokens must fit.
        SearchError: a setting is invalid.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    whole("max_new_tokens", max_new_tokens, CapacityError, most=2**30)
    whole("top_k", top_k, SearchError, most=count_ids(config, allowed))
    check_real("penalty_alpha", penalty_alpha, least=0.0, most=1.0)
    request = prepare(config, prompt_tokens, max_new_tokens + 1, cache, lengths, eos_id=eos_id, mesh=params.mesh)
    check_untraced(request)
    known = None if allowed is None else jax.device_put(np.asarray(allowed, np.int32))
    state = _start(params, config, request, top_k, max_new_tokens, known)
    check_numbers(state.probabilities)
    while int(state.count) < max_new_tokens and not np.all(state.finished):
        state = dataclasses.replace(state, cache=placed(params.mesh, state.cache.reserve(1)))
        until = min(max_new_tokens, int(state.count) + span(state.cache))
        state = _loop(params, config, request.decoding, jnp.float32(penalty_alpha), state, jnp.int32(until))
        check_numbers(state.probabilities)
    tokens = jax.device_put(np.asarray(state.tokens)[:, :max_new_tokens])
    return tokens, state.cache.select(np.arange(request.tokens.shape[0]) * top_k)


def _start(
    params: Params, config: GPT2Config, request: Request, top_k: int, max_new_tokens: int, allowed: jax.Array | None
) -> _State:
    """The state after the prefill."""
    batch, columns = request.tokens.shape
    probabilities, ids, seen, cache = _prefill(
        params, config, request.tokens, request.lengths, request.cache, top_k, allowed
    )
    room = bucket(columns + max_new_tokens) - columns
    filler = request.decoding.filler[:, None]
    return _State(
        tokens=jnp.broadcast_to(filler, (batch, bucket(max_new_tokens))),
        count=jnp.int32(0),
        ids=ids,
        probabilities=probabilities,
        seen=jnp.pad(seen, ((0, 0), (0, room), (0, 0))),
        known=jnp.array(request.lengths),
        finished=jnp.asarray(request.finished),
        cache=cache.fork(top_k),
        allowed=allowed,
    )


@partial(jax.jit, static_argnames=("config", "top_k"), donate_argnames="cache")
def _prefill(
    params: Params,
    config: GPT2Config,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: KVCache,
    top_k: int,
    allowed: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
    """The first candidates' probabilities and ids [B, C], the tokens' hidden states [B, T, D], and the cache."""
    out = run(params, config, tokens, cache, lengths, last=True)
    found = *_candidates(out.logits, top_k, allowed), _unit(out.hidden), out.cache
    return pinned(params.mesh, found)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _loop(
    params: Params, config: GPT2Config, decoding: DecodingParams, alpha: jax.Array, state: _State, until: jax.Array
) -> _State:
    """Runs steps until there are `until` tokens, or until all rows have ended."""

    def unfinished(state: _State) -> jax.Array:
        return (state.count < until) & ~jnp.all(state.finished)

    after = jax.lax.while_loop(unfinished, partial(_step, params, config, decoding, alpha), state)
    return pinned(params.mesh, after)


def _step(params: Params, config: GPT2Config, decoding: DecodingParams, alpha: jax.Array, state: _State) -> _State:
    """Feeds all candidates, and keeps the best of each text."""
    batch, width = state.ids.shape
    going = 1 - state.finished.astype(jnp.int32)
    logits, hidden, cache = feed(params, config, state.ids.reshape(-1), state.cache, jnp.repeat(going, width))
    hidden = _unit(hidden).reshape(batch, width, -1)
    score = (1 - alpha) * state.probabilities - alpha * _similarity(hidden, state.seen, state.known)
    best = jnp.argmax(score, axis=1).astype(jnp.int32)[:, None]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * width + best  # [B, 1]
    token = jnp.take_along_axis(state.ids, best, axis=1)
    probabilities, ids = _candidates(jnp.take(logits, rows[:, 0], axis=0), width, state.allowed)
    chosen = jnp.take_along_axis(hidden, best[..., None], axis=1)
    written = jax.lax.dynamic_update_slice(state.tokens, token, (jnp.int32(0), state.count))
    return _State(
        tokens=jnp.where(state.finished[:, None], state.tokens, written),
        count=state.count + 1,
        ids=ids,
        probabilities=probabilities,
        seen=jax.vmap(jax.lax.dynamic_update_slice)(state.seen, chosen, (state.known, jnp.zeros_like(state.known))),
        known=state.known + going,
        finished=state.finished | decoding.ends(token[:, 0]),
        cache=cache.select(jnp.broadcast_to(rows, state.ids.shape).reshape(-1)),
        allowed=state.allowed,
    )


def _candidates(logits: jax.Array, top_k: int, allowed: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Probabilities and ids [B, C] of the most likely tokens that are allowed."""
    probabilities, ids = jax.lax.top_k(jax.nn.softmax(only_allowed(logits, allowed)), top_k)
    return probabilities, ids


def _unit(hidden: jax.Array) -> jax.Array:
    """Vectors [..., D] of length 1."""
    return hidden * jax.lax.rsqrt(jnp.sum(jnp.square(hidden), axis=-1, keepdims=True))


def _similarity(hidden: jax.Array, seen: jax.Array, known: jax.Array) -> jax.Array:
    """float32 [B, C], the largest cosine of each candidate [B, C, D] with the first `known` [B] of seen [B, S, D]."""
    cosine = jnp.einsum("BCD,BSD->BCS", hidden, seen, precision=EXACT)
    there = jnp.arange(seen.shape[1], dtype=jnp.int32)[None] < known[:, None]
    return jnp.max(jnp.where(there[:, None], cosine, -jnp.inf), axis=-1)
