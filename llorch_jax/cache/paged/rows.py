"""Combining rows of several paged caches: pages are shared if the pools are the same, and copied otherwise."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.cache.paged.allocator import blocks
from llorch_jax.cache.paged.arrays import join_pools, put_pages, same_arrays
from llorch_jax.cache.room import check_rows

Cache = TypeVar("Cache", bound=Any)  # a PagedCache


def insert_rows(cache: Cache, slots: Any, source: Cache) -> Cache:
    """The cache with its rows `slots` replaced by the rows of `source`; see `PagedCache.insert`."""
    index = np.asarray(check_rows(slots, cache.batch_size))
    emptied = cache.free(index)
    tables = np.asarray(source.filled_tables())
    pools = (cache.keys, cache.values)
    theirs = (source.keys, source.values)
    if not same_arrays(pools, theirs):
        cache._check_alike("insert", source)
        named = np.unique(tables[tables >= 0])
        free = emptied.allocator().free_pages(named.size)
        pools = put_pages(pools, free, theirs, named)
        tables = np.where(tables >= 0, free[np.searchsorted(named, tables)] if named.size else -1, -1)
    columns = max(tables.shape[1], emptied.tables.shape[1])
    roomy = emptied.replace(keys=pools[0], values=pools[1], tables=_widened(emptied.tables, columns))
    rows = source.replace(
        keys=pools[0],
        values=pools[1],
        tables=_widened(jnp.asarray(tables, jnp.int32), columns),
        sources=jnp.full_like(source.sources, -1),
    )
    return KVCache.insert(roomy, index, rows)


def join_rows(caches: Sequence[Cache]) -> Cache:
    """The rows of all caches, in order; see `PagedCache.join`."""
    first = caches[0]
    for number, cache in enumerate(caches[1:], 1):
        first._check_alike(f"concat: caches[{number}]", cache)
    tables = [cache.filled_tables() for cache in caches]
    most = sum(cache.batch_size for cache in caches) * blocks(first.limit, first.page_size)
    pools, joined = join_pools([(cache.keys, cache.values) for cache in caches], tables, most)
    own = np.split(np.asarray(joined), np.cumsum([cache.batch_size for cache in caches])[:-1])
    placed = [
        cache.replace(
            keys=pools[0], values=pools[1], tables=jnp.asarray(table), sources=jnp.full_like(cache.sources, -1)
        )
        for cache, table in zip(caches, own, strict=True)
    ]
    return KVCache.join(placed[0], placed[1:])


def _widened(tables: jax.Array, columns: int) -> jax.Array:
    """Tables int32 [B, N] padded to `columns` columns."""
    return jnp.pad(tables, ((0, 0), (0, columns - tables.shape[1])), constant_values=-1)
