"""A generation request: checked on the host, padded to buckets, in the form that the compiled functions take."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.checks import check_append, check_lengths, check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CapacityError, TokenError
from llorch_jax.sampling import Greedy, Sampler, SamplerError


@struct.dataclass
class Policy:
    """How the next token is chosen, and when a row ends.

    Attributes:
        sampler: from logits to ids.
        keys: one per row [B]; the key of a token is this one folded with the token's position.
        eos_ids: int32 [E], ids that end a row; may be empty.
    """

    sampler: Any
    keys: jax.Array
    eos_ids: jax.Array


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked generation request: what `generate_tokens` takes, in the form that the compiled functions take.

    Attributes:
        tokens: int32 [B, T], padded to a bucket.
        lengths: int32 [B].
        cache: with room reserved for the prompt; it will be donated.
        policy: how tokens are chosen and rows end.
        max_new_tokens: at most so many per row.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: KVCache
    policy: Policy
    max_new_tokens: int


def prepare(
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int,
    cache: KVCache | None = None,
    lengths: Any = None,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
) -> Request:
    """Checks the arguments of `generate_tokens` on the host; see there."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise CapacityError(f"max_new_tokens: expected a whole number from 1 up, got {max_new_tokens!r}")
    tokens = check_tokens(config, prompt_tokens)
    lengths = check_lengths(lengths, tokens)
    sampler = Greedy() if sampler is None else sampler
    policy = Policy(sampler, _row_keys(sampler, key, tokens.shape[0]), _eos_ids(config, eos_id))
    tokens, cache = check_append(config, tokens, cache, lengths, later=max_new_tokens - 1)
    if cache is None:
        capacity = bucket(tokens.shape[1] + max_new_tokens - 1, config.n_positions)
        cache = StaticCache.init(config, batch_size=tokens.shape[0], capacity=capacity)
    return Request(pad_to_bucket(tokens, config), lengths, cache, policy, max_new_tokens)


def pad_to_bucket(tokens: jax.Array, config: GPT2Config) -> jax.Array:
    """Tokens [B, T] with padding behind them, so that T is the size of a bucket."""
    count = tokens.shape[1]
    return jnp.pad(tokens, ((0, 0), (0, bucket(count, config.n_positions) - count)))


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
    """The ids that end a row, int32 [E]."""
    ids = [] if eos_id is None else np.atleast_1d(np.asarray(eos_id)).tolist()
    for value in ids:
        if type(value) is not int or not 0 <= value < config.vocab_size:
            raise TokenError(f"eos_id: expected ids in 0 .. {config.vocab_size - 1}, got {value!r}")
    return jnp.asarray(ids, jnp.int32)
