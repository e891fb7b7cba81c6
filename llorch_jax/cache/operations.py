"""Operations on whole caches: branching, joining and splitting batches, converting between layouts."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete

Cache = TypeVar("Cache", bound=KVCache)


def fork(cache: Cache, branches: int) -> Cache:
    """A cache with every row repeated: row b becomes rows b * branches .. (b + 1) * branches - 1.

    Raises:
        CacheError: branches is not a whole number of 1 or more.
    """
    return cache.fork(branches)


def concat(caches: Sequence[Cache]) -> Cache:
    """One cache with the rows of all caches, in order.

    The caches must be of one class, with the same dimensions, codec and settings, including capacities; `convert`
    changes them. Only what a layout chooses itself may differ, such as the current size of a `DynamicCache`.

    Raises:
        CacheError: there is no cache, or they do not match.
    """
    caches = list(caches)
    if not caches:
        raise CacheError("concat: expected at least one cache, got none")
    for number, cache in enumerate(caches):
        if type(cache) is not type(caches[0]):
            raise CacheError(
                f"concat: expected caches of one class, {type(caches[0]).__name__}, "
                f"got a {type(cache).__name__} in caches[{number}]; convert it first"
            )
    return caches[0].join(caches[1:]) if caches[1:] else caches[0]


def split(cache: Cache, sizes: Sequence[int]) -> list[Cache]:
    """Caches of the first sizes[0] rows, the next sizes[1] rows, and so on: the inverse of `concat`.

    Raises:
        CacheError: the sizes are not whole numbers of 1 or more that add up to the batch size.
    """
    sizes = list(sizes)
    if any(type(size) is not int or size < 1 for size in sizes) or sum(sizes) != cache.batch_size:
        raise CacheError(f"sizes: expected numbers from 1 up that add up to {cache.batch_size} rows, got {sizes}")
    starts = np.cumsum([0, *sizes])
    return [cache.select(np.arange(*span)) for span in itertools.pairwise(starts)]


def convert(cache: KVCache, target: Cache) -> Cache:
    """The contents of a cache in another layout, codec or capacity. Host only.

    What the target does not keep, such as tokens outside its window, is dropped. Rounded values of a quantized cache
    stay rounded, and tokens that a cache has dropped are not restored.

    Args:
        cache: the cache to convert; it stays valid.
        target: an empty cache for the same model and batch size.

    Returns:
        The target with all tokens.

    Raises:
        CacheError: the target is not empty, does not match the cache, or keeps tokens that the cache has dropped.
        CapacityError: the target has no room for the longest row.
    """
    _check_target(cache, target)
    lengths = np.asarray(cache.lengths)
    if not lengths.any():
        return target
    slots = _slots_of(cache, lengths, bucket(int(lengths.max()), cache.capacity))
    filled = _fill(cache, target.reserve(lengths), slots, lengths)
    missing = np.argwhere((_slots_of(filled, lengths, slots.shape[1]) >= 0) & (slots < 0))
    if missing.size:
        row, position = missing[0]
        raise CacheError(
            f"convert: expected a {type(cache).__name__} that holds all tokens that the target keeps; row {row} of "
            f"{lengths[row]} tokens has dropped the one at position {position}"
        )
    return filled


def _check_target(cache: KVCache, target: KVCache) -> None:
    if not is_concrete(cache, target):
        raise CacheError("convert: expected caches outside jit, got traced ones")
    for name, expected, got in (
        ("batch_size", cache.batch_size, target.batch_size),
        ("layers, kv heads and head_dim", cache.dims, target.dims),
    ):
        if expected != got:
            raise CacheError(f"target: expected {name} {expected} as in the cache, got {got}")
    held = np.asarray(target.lengths)
    if held.any():
        raise CacheError(f"target: expected an empty cache, got rows of {held.tolist()} tokens")
    target.check_room(np.asarray(cache.lengths))


def _slots_of(cache: KVCache, lengths: np.ndarray, columns: int) -> np.ndarray:
    """int32 [B, columns]: the slot that holds each position of each row, the same in all layers; -1 if none does."""
    held = np.asarray(_positions(cache))
    positions = np.broadcast_to(held, (len(lengths), held.shape[1]))
    rows, slots = np.nonzero((positions >= 0) & (positions < lengths[:, None]))
    found = np.full((len(lengths), columns), -1, np.int32)
    found[rows, positions[rows, slots]] = slots
    return found


@jax.jit
def _positions(cache: KVCache) -> jax.Array:
    return cache.held_positions()


@jax.jit
def _fill(cache: KVCache, target: Cache, slots: jax.Array, lengths: jax.Array) -> Cache:
    """The target with `lengths` int32 [B] tokens per row from the cache's slots int32 [B, T]."""
    index = jnp.maximum(slots, 0)[:, None, :, None]  # any token for a missing one, which is dropped or refused later

    def in_order(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, index, axis=2).transpose(0, 2, 1, 3)  # [B, T, K, H]

    for layer in range(cache.dims[0]):
        view = cache.read(layer).dense()
        target, _ = target.append(layer, in_order(view.k), in_order(view.v), lengths)
    return target.advance(lengths)
