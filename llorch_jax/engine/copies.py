"""Compiled copies of whole pages between an engine's pools and the host."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from llorch_jax.buckets import power_of_two
from llorch_jax.cache.paged import PagedCache
from llorch_jax.cache.placement import pinned

Contents = Any  # keys and values of N pages, for each layer: a pytree of arrays [N, K, page_size, X]
MOST = 32  # pages per call; a program is compiled for each power of two up to this


def pools_of(cache: PagedCache) -> Contents:
    """The keys and values of all pages, as `take` and `put` take and return them."""
    return cache.keys, cache.values


def batches(pages: Sequence[int]) -> Iterator[tuple[slice, np.ndarray]]:
    """The pages in parts for which programs are compiled: which part, and int32 [N] padded with 0 to a power of two."""
    for start in range(0, len(pages), MOST):
        part = slice(start, min(start + MOST, len(pages)))
        numbers = np.zeros(power_of_two(part.stop - start), np.int32)
        numbers[: part.stop - start] = pages[part]
        yield part, numbers


@jax.jit
def take(cache: PagedCache, pages: Any) -> Contents:
    """Copies of the pages int32 [N]; the cache is not donated, and may be donated as soon as this is dispatched."""
    return jax.tree.map(lambda pool: pool.at[pages].get(mode="promise_in_bounds"), pools_of(cache))


@partial(jax.jit, static_argnames="mesh", donate_argnames="cache")
def put(cache: PagedCache, pages: Any, contents: Contents, count: Any, *, mesh: Mesh | None = None) -> PagedCache:
    """The cache with the first `count` of the pages int32 [N] replaced by the contents, in place.

    Pages are updated one at a time, for the reason that `cache.paged.arrays.write_pages` gives.
    """

    def replaced(pool: jax.Array, new: jax.Array) -> jax.Array:
        def replace(row: Any, pool: jax.Array) -> jax.Array:
            page = lax.dynamic_slice_in_dim(new, row, 1)
            return lax.dynamic_update_slice_in_dim(pool, page, jnp.asarray(pages)[row], 0)

        return lax.fori_loop(0, count, replace, pool)

    keys, values = jax.tree.map(replaced, pools_of(cache), contents)
    return pinned(mesh, cache.replace(keys=keys, values=values))
