"""KV caches: immutable pytrees behind one protocol."""

from llorch_jax.attention import KVView
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.buffers import CachePool
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.evicting.cache import EvictingCache
from llorch_jax.cache.evicting.evict import evict
from llorch_jax.cache.evicting.policies import AttentionSinks, HeavyHitters, Policy, RecencyWindow, SnapKV
from llorch_jax.cache.files import fingerprint, load_cache, save_cache
from llorch_jax.cache.layouts import fit_cache, make_cache, parse_cache_spec
from llorch_jax.cache.operations import concat, convert, fork, split
from llorch_jax.cache.paged.cache import PagedCache
from llorch_jax.cache.planning import MemoryPlan, plan_memory
from llorch_jax.cache.quantized import QuantizedCache
from llorch_jax.cache.rotating import RotatingCache
from llorch_jax.cache.static import StaticCache

__all__ = [
    "AttentionSinks",
    "CachePool",
    "DynamicCache",
    "EvictingCache",
    "HeavyHitters",
    "KVCache",
    "KVView",
    "MemoryPlan",
    "PagedCache",
    "Policy",
    "QuantizedCache",
    "RecencyWindow",
    "RotatingCache",
    "SnapKV",
    "StaticCache",
    "concat",
    "convert",
    "evict",
    "fingerprint",
    "fit_cache",
    "fork",
    "load_cache",
    "make_cache",
    "parse_cache_spec",
    "plan_memory",
    "save_cache",
    "split",
]
