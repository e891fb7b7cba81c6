"""The paged layout: the cache, the allocator on the host, and the arrays of pages."""

from llorch_jax.cache.paged.cache import PagedCache

__all__ = ["PagedCache"]
