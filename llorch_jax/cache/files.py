"""Caches on disk: one safetensors file, written atomically; damaged files and other models' files are refused."""

import hashlib
import os
from pathlib import Path

import jax
import numpy as np

from llorch_jax.archive import Kind, read_archive, write_archive
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.codecs import FloatCodec, IntegerCodec, Quantized
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.evicting.cache import EvictingCache
from llorch_jax.cache.evicting.policies import AttentionSinks, HeavyHitters, RecencyWindow, SnapKV
from llorch_jax.cache.paged.cache import PagedCache
from llorch_jax.cache.quantized import QuantizedCache
from llorch_jax.cache.recent import Recent
from llorch_jax.cache.rotating import RotatingCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.linear import QuantizedMatrix
from llorch_jax.params import Params
from llorch_jax.tracing import is_concrete, on_host

LAYOUTS: tuple[type, ...] = (StaticCache, DynamicCache, RotatingCache, PagedCache, QuantizedCache, EvictingCache)
_PARTS = (FloatCodec, IntegerCodec, Quantized, Recent, AttentionSinks, HeavyHitters, RecencyWindow, SnapKV)
CACHE_CLASSES = (*LAYOUTS, *_PARTS)


_KIND = Kind("cache", KVCache, CACHE_CLASSES, CacheError, KVCache.check_fields)


def fingerprint(params: Params, config: GPT2Config) -> str:
    """A SHA-256 hash (hex) of a model's weights and configuration, which ties a saved cache to the model."""
    digest = hashlib.sha256(repr(config).encode())
    for leaf in jax.tree.leaves(params):
        array = on_host(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    for matrix in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix)):
        if isinstance(matrix, QuantizedMatrix) and matrix.x_bits != 16:
            digest.update(f"x_bits {matrix.x_bits}".encode())
    return digest.hexdigest()


def save_cache(path: str | os.PathLike[str], cache: KVCache, *, fingerprint: str = "") -> None:
    """Writes a cache of any layout to a file; the cache stays valid.

    The file is written atomically: an existing file is replaced only by a complete one.

    Args:
        path: path of the file, usually `*.safetensors`.
        cache: the cache to save.
        fingerprint: the model's, from `fingerprint`; `load_cache` compares it.

    Raises:
        CacheError: the cache was donated or is traced, its policy is a custom function, or the file cannot be written.
    """
    check_savable(cache)
    write_archive(Path(path), cache, _KIND, fingerprint)


def load_cache(path: str | os.PathLike[str], *, fingerprint: str | None = None) -> KVCache:
    """The cache that `save_cache` wrote.

    Args:
        path: path of the file.
        fingerprint: that of the model that will use the cache, from `fingerprint`; None skips the comparison.

    Raises:
        CacheError: the file is missing, truncated or corrupt, is not a cache, or has another format or model.
    """
    return read_archive(Path(path), _KIND, fingerprint)


def check_savable(cache: KVCache) -> None:
    """Raises CacheError for a cache that is traced, donated, or of a class that cannot be saved."""
    if type(cache) not in LAYOUTS or not is_concrete(cache):
        names = ", ".join(cls.__name__ for cls in LAYOUTS)
        raise CacheError(f"cache: expected one of {names} outside jit, got {cache!r:.80}")
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cache)):
        raise CacheError("cache: expected JAX arrays, got others; use the cache from before device_get")
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(cache)):
        raise CacheError("cache: expected one on this process's devices, got parts of one that processes share")
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
        raise CacheError("cache: expected one that owns its buffers, got one that was donated to a later step")
