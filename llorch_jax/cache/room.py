"""Checks of cache operations on the host, as JAX would clamp silently: room, shapes, sizes, rows, lengths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError, CapacityError
from llorch_jax.tracing import is_concrete, is_whole, whole


def check_room(lengths: Any, count: Any, capacity: int) -> None:
    """Raises CapacityError if a row of `lengths` int32 [B] has no room for `count`, int or int32 [B], more tokens."""
    if not is_concrete(lengths, count):
        return
    lengths = np.asarray(lengths)
    count = np.asarray(count)
    if count.dtype.kind not in "iu" or count.shape not in ((), lengths.shape) or np.any(count < 0):
        raise CacheError(f"count: expected one number of 0 or more, or one per row, got {count.tolist()}")
    needed = lengths + count
    row = int(np.argmax(needed))
    if needed[row] > capacity:
        raise CapacityError(
            f"cache: row {row} holds {lengths[row]} tokens; adding {needed[row] - lengths[row]} makes {needed[row]}, "
            f"but its capacity is {capacity}"
        )


def active_rows(values: Any, active: Any) -> np.ndarray:
    """The values [B] of the active rows, bool [B]; None means all rows."""
    known = np.asarray(values)
    return known if active is None else known[np.asarray(active)]


def check_new_tokens(
    layer: int, k: jax.Array, v: jax.Array, batch_size: int, dims: tuple[int, int, int], count: Any
) -> None:
    """Raises CacheError unless the layer exists, k and v are [B, T, K, H] as in `dims`, and counts are at most T."""
    layers, *heads = dims
    if not 0 <= layer < layers:
        raise CacheError(f"layer: expected 0 .. {layers - 1}, got {layer}")
    for name, array in (("k", k), ("v", v)):
        shape = list(array.shape)
        if len(shape) != 4 or shape[0] != batch_size or shape[1] < 1 or shape[2:] != heads:
            raise CacheError(f"{name}: expected shape [{batch_size}, T, {heads[0]}, {heads[1]}], got {shape}")
    if k.shape != v.shape:
        raise CacheError(f"v: expected as many tokens as k, {k.shape[1]}, got {v.shape[1]}")
    if count is not None and is_concrete(count) and np.any(np.asarray(count) > k.shape[1]):
        given = np.asarray(count).tolist()
        raise CacheError(f"count: expected at most {k.shape[1]}, the number of tokens, got {given}")


def check_sizes(config: GPT2Config, batch_size: int, capacity: int) -> None:
    """Raises CacheError or CapacityError for an invalid batch size or capacity."""
    whole("batch_size", batch_size, CacheError)
    if not is_whole(capacity) or not 1 <= capacity <= config.n_positions:
        raise CapacityError(f"capacity: expected 1 .. n_positions={config.n_positions}, got {capacity!r:.80}")


def check_rows(rows: Any, batch_size: int) -> jax.Array:
    """Row numbers as int32 [B'], checked against the batch size if they are concrete."""
    if is_concrete(rows):
        known = np.asarray(rows)
        if known.ndim != 1 or known.size == 0 or known.dtype.kind not in "iu":
            raise CacheError(f"rows: expected a list of row numbers, got {rows!r:.80}")
        if known.min() < 0 or known.max() >= batch_size:
            raise CacheError(f"rows: expected row numbers 0 .. {batch_size - 1}, got {known.tolist()}")
    return jnp.asarray(rows, jnp.int32)


def cropped(lengths: jax.Array, length: Any) -> jax.Array:
    """Row lengths after rolling back to at most `length`, an int or int32 [B]."""
    if is_concrete(length):
        known = np.asarray(length)
        if known.dtype.kind not in "iu" or known.shape not in ((), lengths.shape) or np.any(known < 0):
            raise CacheError(f"crop: expected 1 or {lengths.size} whole numbers of 0 or more, got {length!r:.80}")
    return jnp.minimum(lengths, jnp.asarray(length, jnp.int32))
