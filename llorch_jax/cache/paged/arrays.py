"""Arrays of pages: writing, copying, gathering and joining. For bookkeeping see `allocator` and `cache`."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llorch_jax.cache.writes import token_positions
from llorch_jax.kernels.writes import write

Pools = Any  # a pytree of arrays [P, K, page_size, X]


@partial(jax.jit, inline=True)  # compiled once for calls outside jit
def copy_pages(pool: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """Copies page sources[b] to targets[b], both int32 [B], for the rows with a source of 0 or more."""
    origins = jnp.where(sources >= 0, sources, targets)

    def copy(row: Any, filled: jax.Array) -> jax.Array:
        page = lax.dynamic_slice_in_dim(filled, origins[row], 1)
        return lax.dynamic_update_slice_in_dim(filled, page, targets[row], 0)

    rows = jnp.where(jnp.any(sources >= 0), sources.size, 0)  # most steps have nothing to copy
    return lax.fori_loop(0, rows, copy, pool)


@partial(jax.jit, inline=True)
def write_pages(pool: jax.Array, new: jax.Array, tables: jax.Array, starts: jax.Array, counts: jax.Array) -> jax.Array:
    """Writes only each row's first `counts` new tokens, to its positions from `starts` on.

    Args:
        pool: [P, K, page_size, X].
        new: [B, T, K, X], of the pool's dtype.
        tables: int32 [B, N]; tokens without a page are dropped.
        starts: int32 [B].
        counts: int32 [B], at most T.
    """
    return write(_page_places(pool.shape[2]), _write_pages, pool, new, tables, starts, counts)


def _with_pages(tables: jax.Array, size: int, starts: jax.Array, counts: jax.Array) -> jax.Array:
    """int32 [B], how many of each row's new tokens have a page."""
    columns = jnp.arange(1, tables.shape[1] + 1, dtype=jnp.int32)
    ends = jnp.max(jnp.where(tables >= 0, columns, 0), axis=1)  # pages before a row's last one may have been freed
    return jnp.minimum(counts, ends * size - starts)


@cache
def _page_places(size: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def places(new: jax.Array, tables: jax.Array, starts: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = token_positions(new, starts)
        real = jnp.arange(new.shape[1])[None] < _with_pages(tables, size, starts, counts)[:, None]
        pages = jnp.take_along_axis(tables, positions // size, axis=1, mode="clip")
        return jnp.where(real, pages, -1), positions % size

    return places


def _write_pages(pool: jax.Array, new: jax.Array, tables: jax.Array, starts: jax.Array, counts: jax.Array) -> jax.Array:
    """Writes one token at a time: a plain update of a slice is the only write for which XLA never copies the pool."""
    batch, _, heads, head_dim = new.shape
    size = pool.shape[2]
    counts = _with_pages(tables, size, starts, counts)

    def write_row(row: Any, filled: jax.Array) -> jax.Array:
        def write_token(token: Any, filled: jax.Array) -> jax.Array:
            position = starts[row] + token
            block = lax.dynamic_slice(new, (row, token, 0, 0), (1, 1, heads, head_dim))
            where = (tables[row, position // size], 0, position % size, 0)
            return lax.dynamic_update_slice(filled, block.reshape(1, heads, 1, head_dim), where)

        return lax.fori_loop(0, counts[row], write_token, filled)

    return write_row(0, pool) if batch == 1 else lax.fori_loop(0, batch, write_row, pool)


def gather_pages(pool: jax.Array, pages: jax.Array) -> jax.Array:
    """The slots of the pages int32 [B, N], in order: [B, K, N * page_size, X] of a pool [P, K, page_size, X]."""
    found = pool.at[pages].get(mode="promise_in_bounds").swapaxes(1, 2)  # [B, K, N, page_size, X]
    return found.reshape(*found.shape[:2], -1, found.shape[4])


def of_all_rows(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays [B, ...] of all rows, where these are divided among devices (see `sharding`) that all hold every page."""
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.manual_axes or mesh.shape["data"] == 1:
        return list(arrays)
    return [lax.all_gather(array, "data", tiled=True) for array in arrays]


def put_pages(pools: Pools, pages: np.ndarray, source: Pools, taken: np.ndarray) -> Pools:
    """The pools with pages `pages` int [M] replaced by pages `taken` int [M] of the source."""

    def put(pool: jax.Array, other: jax.Array) -> jax.Array:
        return pool.at[pages].set(jnp.take(other, taken, axis=0))

    return jax.tree.map(put, pools, source)


def same_arrays(first: Pools, second: Pools) -> bool:
    """Whether two trees hold identical array objects, so that neither was written since they were shared."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(one is other for one, other in pairs)


def join_pools(pools: Sequence[Pools], tables: Sequence[jax.Array], most: int) -> tuple[Pools, jax.Array]:
    """One pool for the rows of several caches, and their block tables int32 [B, N], concatenated.

    If all pools are the same arrays, they are returned unchanged.

    Args:
        pools: the pools of each cache.
        tables: the tables of each cache, int32 [B, N]; -1 for no page.
        most: maximum number of pages that the new pool can need.
    """
    columns = max(table.shape[1] for table in tables)
    known = [np.pad(table, ((0, 0), (0, columns - table.shape[1])), constant_values=-1) for table in tables]
    if all(same_arrays(each, pools[0]) for each in pools):
        return pools[0], jnp.asarray(np.concatenate(known))
    sizes = [jax.tree.leaves(each)[0].shape[0] for each in pools]
    named = [np.unique(table[table >= 0]) for table in known]
    # Keep the number of free pages, but no more than all rows could ever use.
    total = max(sum(pages.size for pages in named), min(sum(sizes), max(*sizes, most)))
    starts = np.cumsum([0, *(pages.size for pages in named)])
    moved = [
        np.where(table >= 0, np.searchsorted(pages, table) + start, -1)
        for table, pages, start in zip(known, named, starts[:-1], strict=True)
    ]

    def gathered(*arrays: jax.Array) -> jax.Array:
        used = jnp.concatenate([jnp.take(array, pages, axis=0) for array, pages in zip(arrays, named, strict=True)])
        return jnp.pad(used, ((0, total - used.shape[0]), (0, 0), (0, 0), (0, 0)))

    return jax.tree.map(gathered, *pools), jnp.asarray(np.concatenate(moved), jnp.int32)
