"""Arrays of pages: writing, copying and joining them. No bookkeeping: see `pages` and `paged`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


def join_pools(pools: Sequence[tuple[Arrays, Arrays]]) -> tuple[Arrays, Arrays, list[int]]:
    """Keys and values of several pools behind one another, and the number that each pool's first page gets.

    Pools that are the same arrays appear once: a write would have made other arrays of them.

    Args:
        pools: keys and values, L arrays [P, K, page_size, H] each.
    """
    identities = [tuple(id(array) for arrays in pool for array in arrays) for pool in pools]
    different, starts, pages = [], {}, 0
    for identity, (keys, values) in zip(identities, pools, strict=True):
        if identity not in starts:
            starts[identity] = pages
            different.append((keys, values))
            pages += keys[0].shape[0]
    keys, values = (
        tuple(arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays) for arrays in zip(*kind, strict=True))
        for kind in zip(*different, strict=True)
    )
    return keys, values, [starts[identity] for identity in identities]


def join_tables(tables: Sequence[jax.Array], starts: Sequence[int]) -> jax.Array:
    """Block tables int32 [B, N] below one another, for pools whose first pages have become pages `starts`."""
    columns = max(table.shape[1] for table in tables)
    moved = [jnp.where(table >= 0, table + start, -1) for table, start in zip(tables, starts, strict=True)]
    return jnp.concatenate(
        [jnp.pad(table, ((0, 0), (0, columns - table.shape[1])), constant_values=-1) for table in moved]
    )
