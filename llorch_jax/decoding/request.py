"""A generation request: checked on the host, padded to buckets, in the form that the compiled functions take."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.buckets import bucket, power_of_two
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.checks import check_append, check_lengths, check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.overflow import Reencode, check_overflow, context_of, padded, shortened
from llorch_jax.errors import CapacityError, SamplerError, TokenError
from llorch_jax.sampling import Greedy, History, Sampler
from llorch_jax.tracing import is_concrete

_NEXT_PART = np.int32(2**31 - 1)  # no position: what keys are folded with after a re-encoding


@struct.dataclass
class Policy:
    """How the next token is chosen, and when a row ends.

    Attributes:
        sampler: from logits to ids.
        keys: one per row [B]; the key of a token is this one folded with the token's position.
        eos_ids: int32 [E], ids that end a row; may be empty.
        top_logprobs: how many alternatives to record at every step.
    """

    sampler: Any
    keys: jax.Array
    eos_ids: jax.Array
    top_logprobs: int = struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked generation request: what `generate_tokens` takes, in the form that the compiled functions take.

    Attributes:
        tokens: int32 [B, T], padded to a bucket.
        lengths: int32 [B].
        cache: with room reserved for the prompt; it will be donated.
        policy: how tokens are chosen and rows end.
        max_new_tokens: at most so many per row before the context is full.
        finished: bool [B], rows that have ended already.
        later: how many more tokens per row are to follow after a re-encoding.
        reencode: what is kept then; None where the context cannot overflow.
        history: `History` of the prompt with room for all new tokens; None where the sampler does not look at it.
        memory: what the sampler starts with.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: KVCache
    policy: Policy
    max_new_tokens: int
    finished: jax.Array
    later: int = 0
    reencode: Reencode | None = None
    history: History | None = None
    memory: Any = None


def prepare(
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int,
    cache: KVCache | None = None,
    lengths: Any = None,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    overflow: str | Reencode = "error",
    *,
    top_logprobs: int = 0,
    room: int | None = None,
) -> Request:
    """Checks the arguments of `generate_tokens` on the host; see there.

    `top_logprobs` alternatives are recorded at every step; the history has room for `room` tokens where that is more.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise CapacityError(f"max_new_tokens: expected a whole number from 1 up, got {max_new_tokens!r}")
    tokens = check_tokens(config, prompt_tokens)
    lengths = check_lengths(lengths, tokens)
    sampler = Greedy() if sampler is None else sampler
    if type(top_logprobs) is not int or not 0 <= top_logprobs <= config.vocab_size:
        raise SamplerError(f"top_logprobs: expected 0 .. vocab_size={config.vocab_size}, got {top_logprobs!r}")
    if hasattr(sampler, "check_ids"):
        sampler.check_ids(config.vocab_size)
    policy = Policy(sampler, _row_keys(sampler, key, tokens.shape[0]), _eos_ids(config, eos_id), top_logprobs)
    reencode, later = check_overflow(overflow), 0
    if reencode is not None:
        context = context_of(config, cache)
        tokens, lengths = shortened(reencode, tokens, lengths, context)
        later = max(0, max_new_tokens - (context + 1 - int(np.max(lengths))))
        if later and cache is not None:  # pages for rows that fill the context, as in the end they do
            cache.check_room(context)
    now = max_new_tokens - later
    tokens, cache = check_append(config, tokens, cache, lengths, later=now - 1)
    if cache is None:
        capacity = bucket(tokens.shape[1] + now - 1, config.n_positions)
        cache = StaticCache.init(config, batch_size=tokens.shape[0], capacity=capacity)
    finished = jnp.zeros(tokens.shape[0], bool)
    padded_tokens, history = pad_to_bucket(tokens, config), None
    if getattr(sampler, "needs_history", False):
        history = History.of(padded_tokens, lengths, bucket(max(tokens.shape[1] + max_new_tokens, room or 0)))
    memory = sampler.start(tokens.shape[0]) if hasattr(sampler, "start") else None
    return Request(padded_tokens, lengths, cache, policy, now, finished, later, reencode, history, memory)


def following(config: GPT2Config, request: Request, new: np.ndarray, state: Any) -> Request:
    """The request that goes on after one that filled the context.

    Args:
        config: the model's hyperparameters.
        request: the one before, with `later` above 0.
        new: its new tokens, int32 [B, N].
        state: of decoding in the end; its cache is cleared and used again.
    """
    assert request.reencode is not None
    cache = state.cache
    rows = _grown_rows(request, new)
    cut = np.array([len(row) > cache.capacity for row in rows])  # the others go on as they would alone
    kept, counts = padded(
        [request.reencode.kept(row, cache.capacity) if long else row for row, long in zip(rows, cut, strict=True)]
    )
    # Positions start again, and a key is folded with the position: other keys for the next part of the text.
    folded = jax.vmap(jax.random.fold_in, (0, None))(request.policy.keys, _NEXT_PART)
    keys = jnp.where(jnp.asarray(cut), folded, request.policy.keys)
    now = min(request.later, cache.capacity + 1 - int(np.max(counts)))
    kept, cache = check_append(config, kept, cache.clear(), counts, later=now - 1)
    return dataclasses.replace(
        request,
        tokens=pad_to_bucket(kept, config),
        lengths=counts,
        cache=cache,
        policy=dataclasses.replace(request.policy, keys=keys),
        max_new_tokens=now,
        finished=state.finished,
        later=request.later - now,
        history=state.history,
        memory=state.memory,
    )


def _grown_rows(request: Request, new: np.ndarray) -> list[np.ndarray]:
    """Each row's tokens with the new ones int32 [B, N]; of rows that have ended without the last, as in the cache."""
    rows = []
    ended = np.isin(new, np.asarray(request.policy.eos_ids))
    before = zip(np.asarray(request.tokens), np.asarray(request.lengths), np.asarray(request.finished), strict=True)
    for (row, count, finished), more, ends in zip(before, new, ended, strict=True):
        added = 0 if finished else int(ends.argmax()) if ends.any() else len(more)
        rows.append(np.concatenate([row[:count], more[:added]]))
    return rows


def pad_to_bucket(tokens: jax.Array, config: GPT2Config) -> jax.Array:
    """Tokens [B, T] with padding behind them, so that T is the size of a bucket; single tokens stay by themselves."""
    count = tokens.shape[1]
    size = 1 if count == 1 else bucket(count, config.n_positions)
    padding = ((0, 0), (0, size - count))
    if is_concrete(tokens):  # by NumPy: jnp.pad, and jnp.asarray, would be compiled for every length
        return jax.device_put(np.pad(np.asarray(tokens), padding))
    return jnp.pad(tokens, padding)


def _row_keys(sampler: Sampler, key: jax.Array | None, batch: int) -> jax.Array:
    """One key per row [B]."""
    if key is None:
        if sampler.needs_key:
            raise SamplerError("key: expected a jax.random.key for a sampler that draws, got None")
        key = jax.random.key(0)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise SamplerError(f"key: expected a jax.random.key, got an array of dtype {key.dtype}")
    if key.shape == (batch,):
        return key
    if key.shape != ():
        raise SamplerError(f"key: expected one key or {batch}, one per row, got shape {list(key.shape)}")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def _eos_ids(config: GPT2Config, eos_id: int | Sequence[int] | None) -> jax.Array:
    """The ids that end a row, int32 [E]; the first is repeated up to a power of two, so that few sizes are compiled."""
    ids = [] if eos_id is None else np.atleast_1d(np.asarray(eos_id)).tolist()
    for value in ids:
        if type(value) is not int or not 0 <= value < config.vocab_size:
            raise TokenError(f"eos_id: expected ids in 0 .. {config.vocab_size - 1}, got {value!r}")
    return jnp.asarray(ids + ids[:1] * (power_of_two(len(ids)) - len(ids)), jnp.int32)
