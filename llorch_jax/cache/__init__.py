"""KV caches: immutable pytrees behind one protocol."""

from llorch_jax.cache.base import KVCache, KVView
from llorch_jax.cache.static import StaticCache

__all__ = ["KVCache", "KVView", "StaticCache"]
