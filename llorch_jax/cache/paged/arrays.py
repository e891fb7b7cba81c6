"""Arrays of pages: writing, copying and joining them. No bookkeeping: see `pages` and `paged`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Arrays = tuple[jax.Array, ...]


def copy_pages(pool: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """Copies page sources[b] to targets[b], both int32 [B], for the rows with a source of 0 or more."""
    origins = jnp.where(sources >= 0, sources, targets)

    def copy(row: Any, filled: jax.Array) -> jax.Array:
        page = lax.dynamic_slice_in_dim(filled, origins[row], 1)
        return lax.dynamic_update_slice_in_dim(filled, page, targets[row], 0)

    rows = jnp.where(jnp.any(sources >= 0), sources.size, 0)  # the usual step has nothing to copy
    return lax.fori_loop(0, rows, copy, pool)


def write_pages(pool: jax.Array, new: jax.Array, tables: jax.Array, starts: jax.Array, counts: jax.Array) -> jax.Array:
    """Writes each row's first `counts` new tokens to its positions from `starts` on, and nothing else.

    It takes one token after the other, real ones only: a plain update of a slice is all that XLA never copies for.

    Args:
        pool: [P, K, page_size, H].
        new: [B, T, K, H], of the pool's dtype.
        tables: int32 [B, N]; tokens for which there is no page are dropped.
        starts: int32 [B].
        counts: int32 [B], at most T.
    """
    batch, _, heads, head_dim = new.shape
    size = pool.shape[2]
    counts = jnp.minimum(counts, jnp.sum(tables >= 0, axis=1, dtype=jnp.int32) * size - starts)

    def write_row(row: Any, filled: jax.Array) -> jax.Array:
        def write(token: Any, filled: jax.Array) -> jax.Array:
            position = starts[row] + token
            block = lax.dynamic_slice(new, (row, token, 0, 0), (1, 1, heads, head_dim))
            where = (tables[row, position // size], 0, position % size, 0)
            return lax.dynamic_update_slice(filled, block.reshape(1, heads, 1, head_dim), where)

        return lax.fori_loop(0, counts[row], write, filled)

    return write_row(0, pool) if batch == 1 else lax.fori_loop(0, batch, write_row, pool)


def join_pools(
    pools: Sequence[tuple[Arrays, Arrays]], tables: Sequence[jax.Array], most: int
) -> tuple[Arrays, Arrays, jax.Array]:
    """One pool for the rows of several caches: keys, values, and block tables int32 [B, N] below one another.

    Pools that are the same arrays stay as they are: a write would have made other arrays of them.

    Args:
        pools: keys and values of each cache, L arrays [P, K, page_size, H].
        tables: of each cache, int32 [B, N]; -1 for no page.
        most: pages that the new pool needs at most.
    """
    columns = max(table.shape[1] for table in tables)
    known = [np.pad(table, ((0, 0), (0, columns - table.shape[1])), constant_values=-1) for table in tables]
    keys, values = pools[0]
    if all(ours is other for pool in pools for ours, other in zip((*keys, *values), (*pool[0], *pool[1]), strict=True)):
        return keys, values, jnp.asarray(np.concatenate(known))
    sizes = [pool[0][0].shape[0] for pool in pools]
    named = [np.unique(table[table >= 0]) for table in known]
    total = max(sum(page.size for page in named), min(sum(sizes), max(*sizes, most)))
    starts = np.cumsum([0, *(pages.size for pages in named)])
    moved = [
        np.where(table >= 0, np.searchsorted(pages, table) + start, -1)
        for table, pages, start in zip(known, named, starts[:-1], strict=True)
    ]

    def gathered(arrays: Sequence[jax.Array]) -> jax.Array:
        used = jnp.concatenate([jnp.take(array, pages, axis=0) for array, pages in zip(arrays, named, strict=True)])
        return jnp.pad(used, ((0, total - used.shape[0]), (0, 0), (0, 0), (0, 0)))

    new_keys, new_values = (tuple(map(gathered, zip(*(pool[kind] for pool in pools), strict=True))) for kind in (0, 1))
    return new_keys, new_values, jnp.asarray(np.concatenate(moved), jnp.int32)
