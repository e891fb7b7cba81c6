"""CachePool: a pool that reuses the buffers of released caches."""

import threading
from collections.abc import Hashable
from functools import partial
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from llorch_jax.cache.base import KVCache
from llorch_jax.cache.layouts import new_cache
from llorch_jax.cache.placement import mesh_of
from llorch_jax.cache.placement import new_cache as made_on
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete

Cache = TypeVar("Cache", bound=KVCache)


class CachePool:
    """Keeps the buffers of released caches for reuse, so that a call need not allocate new ones.

    Thread-safe. A cache is acquired, goes through any number of steps, and the last cache of the chain is released.
    That one is donated: its buffers then belong to the pool, and JAX refuses any further use of it and of every other
    cache that shares them.

        pool = CachePool()
        cache = pool.acquire(StaticCache, config, batch_size=1, capacity=256)
        tokens, cache = generate_tokens(params, config, prompt, cache=cache)
        pool.release(cache)
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """An empty pool.

        Args:
            max_bytes: maximum number of bytes kept; a cache that would exceed it is dropped on release. None for none.
        """
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._free: dict[Hashable, list[KVCache]] = {}
        self._kinds: dict[Hashable, Hashable] = {}  # from arguments to the `allocation` of the new cache

    def acquire(self, cls: type[Cache], config: GPT2Config, *, mesh: Mesh | None = None, **settings: Any) -> Cache:
        """An empty cache as `cls.init(config, **settings)` makes it, in released buffers if suitable ones exist.

        The buffers of a layout that grows may be larger than those of a new cache. For a model on a mesh, name it:
        `mesh=model.params.mesh`.

        Raises:
            CacheError, CapacityError: as `init`.
        """
        make = partial(new_cache, cls, config, **settings)
        arguments = (cls, config, mesh, tuple(sorted((name, str(value)) for name, value in settings.items())))
        with self._lock:
            if arguments not in self._kinds:
                self._kinds[arguments] = (mesh, jax.eval_shape(make).allocation())
            free = self._free.get(self._kinds[arguments])
            if free:
                return free.pop()  # type: ignore[return-value]  # the class is part of the kind
        return made_on(mesh, new_cache, cls, config, **settings)

    def release(self, cache: KVCache) -> None:
        """Returns a cache to the pool; neither it nor any cache that shares its buffers can be used afterwards.

        Raises:
            CacheError: it has already been donated to a later step or released, or is traced.
        """
        if not is_concrete(cache):
            raise CacheError("release: expected a cache outside jit, got a traced one")
        with self._lock:  # if two threads release the same cache, one is refused
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
                raise CacheError(
                    "release: expected a cache that owns its buffers; this one was donated to a later step or released "
                    "before (release the last cache of the chain)"
                )
            if self._max_bytes is not None and self._usage() + cache.memory_usage() > self._max_bytes:
                return
            mine = _take_over(cache.clear())
            self._free.setdefault((mesh_of(mine), mine.allocation()), []).append(mine)

    def drop(self) -> None:
        """Frees all kept buffers."""
        with self._lock:
            self._free.clear()

    def memory_usage(self) -> int:
        """Bytes of all kept buffers."""
        with self._lock:
            return self._usage()

    def _usage(self) -> int:
        return sum(cache.memory_usage() for caches in self._free.values() for cache in caches)


@partial(jax.jit, donate_argnames="cache")
def _take_over(cache: Cache) -> Cache:
    """The same cache in the same memory with new handles; the old ones become invalid."""
    return cache
