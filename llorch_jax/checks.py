"""Checks on the host before a jitted call, in which JAX would silently clamp bad ids and positions."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError, CapacityError, TokenError
from llorch_jax.tracing import is_concrete

MaybeCache = TypeVar("MaybeCache", bound=KVCache | None)


def check_tokens(config: GPT2Config, tokens: Any) -> Any:
    """Token ids as int32 [B, T], a NumPy array unless traced; values are checked if they are concrete.

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
    if not is_concrete(tokens):
        return jnp.asarray(tokens, jnp.int32)
    known = np.asarray(tokens)
    bad = np.argwhere((known < 0) | (known >= config.vocab_size))
    if len(bad):
        row, column = bad[0]
        raise TokenError(
            f"tokens[{row}, {column}]: expected an id in 0 .. {config.vocab_size - 1}, got {known[row, column]}"
        )
    return known.astype(np.int32, copy=False)


def check_lengths(lengths: Any, tokens: Any) -> Any:
    """Prompt lengths as int32 [B], each in 1 .. T of `tokens` [B, T]; None means that every row is full.

    The result is a NumPy array unless traced.

    Raises:
        TokenError: they do not match the tokens.
    """
    batch, count = tokens.shape
    if lengths is None:
        return np.full(batch, count, np.int32)
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TokenError(
            f"lengths: expected integers of shape [{batch}], got {lengths.dtype} of shape {list(lengths.shape)}"
        )
    if not is_concrete(lengths):
        return jnp.asarray(lengths, jnp.int32)
    known = np.asarray(lengths)
    if known.min() < 1 or known.max() > count:
        row = int(np.argmax((known < 1) | (known > count)))
        raise TokenError(f"lengths[{row}]: expected 1 .. {count} tokens, got {known[row]}")
    return known.astype(np.int32, copy=False)


def check_append(
    config: GPT2Config, tokens: Any, cache: MaybeCache, count: Any = None, later: Any = 0
) -> tuple[Any, MaybeCache]:
    """Checked tokens int32 [B, T], and the cache with room reserved for them.

    Args:
        config: the model's hyperparameters.
        tokens: ids [B, T].
        cache: the cache to which they are appended, or None.
        count: int32 [B], number of real tokens in each row; None means T.
        later: number of tokens per row that will follow these, for which there must be room as well.

    Raises:
        TokenError: as `check_tokens`.
        CapacityError: they do not fit into the context or the cache.
        CacheError: the cache is of another model, or was donated.
    """
    tokens = check_tokens(config, tokens)
    batch, columns = tokens.shape
    count = np.full(batch, columns, np.int32) if count is None else count
    if cache is None:
        check_context(config, np.zeros(batch, np.int32), count + later)
        return tokens, cache
    check_cache(config, cache)
    if cache.batch_size != batch:
        raise TokenError(f"tokens: expected {cache.batch_size} rows, as many as the cache has, got {batch}")
    if not is_concrete(cache) and columns + np.max(later) > cache.room():
        raise CapacityError(
            f"cache: expected room for {columns + np.max(later)} tokens per row, got a {type(cache).__name__} of "
            f"{cache.room()} slots, which cannot grow inside jit; call its `reserve` before"
        )
    check_context(config, cache.lengths, count + later)
    cache.check_room(count + later)
    return tokens, cache.reserve(count)


def check_cache(config: GPT2Config, cache: KVCache) -> None:
    """Raises CacheError for what is no cache, was made for another model, or has buffers that have been donated."""
    if not isinstance(cache, KVCache):
        raise CacheError(f"cache: expected a KVCache, as make_cache makes, got {cache!r:.80}")
    expected = (config.cache_layers, config.kv_heads, config.head_dim)
    if cache.dims != expected:
        raise CacheError(f"cache: expected layers, kv heads and head_dim {expected} as the model has, got {cache.dims}")
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cache) if is_concrete(leaf)):
        raise CacheError(
            "cache: expected one that owns its buffers, got one that was donated to a later step, itself or through a "
            "cache with the same buffers; use the cache that the step returned"
        )


def check_context(config: GPT2Config, lengths: Any, count: Any) -> None:
    """Raises CapacityError if `lengths` + `count` tokens exceed the model's context."""
    if not is_concrete(lengths, count):
        return
    longest = int(np.max(np.asarray(lengths) + np.asarray(count)))
    if longest > config.n_positions:
        raise CapacityError(f"tokens: expected at most n_positions={config.n_positions} per row, got {longest}")
