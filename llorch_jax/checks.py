"""Checks on the host, before a jitted call: inside one, JAX clamps bad ids and positions silently."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError, CapacityError, TokenError
from llorch_jax.tracing import is_concrete

MaybeCache = TypeVar("MaybeCache", bound=KVCache | None)


def check_tokens(config: GPT2Config, tokens: Any) -> jax.Array:
    """Token ids as int32 [B, T]; their values are checked where they are known, that is outside a traced function.

    Raises:
        TokenError: they are empty, misshapen, not integers, or outside the vocabulary.
    """
    if not isinstance(tokens, jax.Array):
        try:
            tokens = np.asarray(tokens)
        except ValueError as error:
            raise TokenError(
                f"tokens: expected rows of equal length [B, T]; pad them and pass lengths ({error})"
            ) from None
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise TokenError(f"tokens: expected at least one token per row, shape [B, T], got shape {list(tokens.shape)}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TokenError(f"tokens: expected integer ids, got dtype {tokens.dtype}")
    if is_concrete(tokens):
        known = np.asarray(tokens)
        bad = np.argwhere((known < 0) | (known >= config.vocab_size))
        if len(bad):
            row, column = bad[0]
            raise TokenError(
                f"tokens[{row}, {column}]: expected an id in 0 .. {config.vocab_size - 1}, got {known[row, column]}"
            )
    return jnp.asarray(tokens, jnp.int32)


def check_lengths(lengths: Any, tokens: jax.Array) -> jax.Array:
    """Prompt lengths as int32 [B], each in 1 .. T of `tokens` [B, T]; None means that every row is full.

    Raises:
        TokenError: they do not fit the tokens.
    """
    batch, count = tokens.shape
    if lengths is None:
        return jnp.full(batch, count, jnp.int32)
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TokenError(
            f"lengths: expected integers of shape [{batch}], got {lengths.dtype} of shape {list(lengths.shape)}"
        )
    if is_concrete(lengths):
        known = np.asarray(lengths)
        if known.min() < 1 or known.max() > count:
            raise TokenError(f"lengths: expected 1 .. {count} tokens in every row, got {known.tolist()}")
    return jnp.asarray(lengths, jnp.int32)


def check_append(
    config: GPT2Config, tokens: Any, cache: MaybeCache, count: Any = None, later: int = 0
) -> tuple[jax.Array, MaybeCache]:
    """Checked tokens int32 [B, T], and the cache with room reserved for them.

    Args:
        config: the model's hyperparameters.
        tokens: ids [B, T].
        cache: what they are appended to, or None.
        count: int32 [B], how many tokens of each row are real; None means T.
        later: how many tokens per row will follow these, for which there must be room in the end.

    Raises:
        TokenError: as `check_tokens`.
        CapacityError: they do not fit the context or the cache.
        CacheError: the cache is of another model, or was donated.
    """
    tokens = check_tokens(config, tokens)
    batch, columns = tokens.shape
    count = np.full(batch, columns, np.int32) if count is None else count
    if cache is None:
        check_context(config, np.zeros(batch, np.int32), count + later)
        return tokens, cache
    if cache.batch_size != batch:
        raise TokenError(f"tokens: expected as many rows as the cache has, {cache.batch_size}, got {batch}")
    check_cache(config, cache)
    if not is_concrete(cache) and columns + later > cache.slots_in_jit:
        raise CapacityError(
            f"cache: expected room for {columns + later} tokens per row, got a {type(cache).__name__} of "
            f"{cache.slots_in_jit} slots, which cannot grow inside jit; call its `reserve` before"
        )
    check_context(config, cache.lengths, count + later)
    cache.check_room(count + later)
    return tokens, cache.reserve(count)


def check_cache(config: GPT2Config, cache: KVCache) -> None:
    """Raises CacheError for a cache that was made for another model, or whose buffers have been donated."""
    expected = (config.cache_layers, config.kv_heads, config.head_dim)
    if cache.layout != expected:
        raise CacheError(
            f"cache: expected layers, kv heads and head_dim {expected} as the model has, got {cache.layout}"
        )
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cache) if is_concrete(leaf)):
        raise CacheError(
            "cache: expected one that owns its buffers, got one that was donated to a later step, itself or through a "
            "cache with the same buffers; go on with the cache that the step returned"
        )


def check_context(config: GPT2Config, lengths: Any, count: Any) -> None:
    """Raises CapacityError where `lengths` + `count` tokens exceed the model's context."""
    if not is_concrete(lengths, count):
        return
    longest = int(np.max(np.asarray(lengths) + np.asarray(count)))
    if longest > config.n_positions:
        raise CapacityError(f"tokens: expected at most n_positions={config.n_positions} per row, got {longest}")
