"""Caches on disk: one safetensors file, written atomically, refused where it is damaged or of another model."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llorch_jax.cache.base import KVCache, is_concrete
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.paged import PagedCache
from llorch_jax.cache.quantized import Quantized, QuantizedCache, Recent
from llorch_jax.cache.rotating import RotatingCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.params import Params

FORMAT = "llorch_jax cache 1"
_CACHES = {cls.__name__: cls for cls in (StaticCache, DynamicCache, RotatingCache, PagedCache, QuantizedCache)}
_GROUPS: dict[str, Any] = {cls.__name__: cls for cls in (Quantized, Recent)}


def fingerprint(params: Params, config: GPT2Config) -> str:
    """A hash of a model's weights and configuration, by which a saved cache is tied to it: SHA-256 in hex."""
    digest = hashlib.sha256(repr(config).encode())
    for leaf in jax.tree.leaves(params):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_cache(path: str | os.PathLike[str], cache: KVCache, *, fingerprint: str = "") -> None:
    """Writes a cache of any layout to a file; the cache stays valid.

    The file appears whole or not at all; one that stood there before stays until then.

    Args:
        path: of the file, by custom `.safetensors`.
        cache: what to save.
        fingerprint: of the model, from `fingerprint`; `load_cache` compares it.

    Raises:
        CacheError: the cache was donated or is traced, or the file cannot be written.
    """
    if type(cache).__name__ not in _CACHES or not is_concrete(cache):
        raise CacheError(f"cache: expected one of {', '.join(_CACHES)} outside jit, got {cache!r:.80}")
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
        raise CacheError("cache: expected one that owns its buffers, got one that was donated to a later step")
    tensors: dict[str, np.ndarray] = {}
    names = [field.name for field in dataclasses.fields(_CACHES[type(cache).__name__])]
    fields = {name: _describe(getattr(cache, name), name, tensors) for name in names}
    about = {"format": FORMAT, "class": type(cache).__name__, "fields": fields, "fingerprint": fingerprint}
    metadata = {"cache": json.dumps(about, sort_keys=True)}
    metadata["sha256"] = _checksum(metadata["cache"], tensors)
    _write_atomically(Path(path), save(tensors, metadata))


def load_cache(path: str | os.PathLike[str], *, fingerprint: str | None = None) -> KVCache:
    """The cache that `save_cache` wrote.

    Args:
        path: of the file.
        fingerprint: of the model that will use it, from `fingerprint`; None does not compare.

    Raises:
        CacheError: the file is missing, truncated, corrupt, of another format, or of another model.
    """
    metadata, tensors = _read(Path(path))
    if "cache" not in metadata or metadata.get("sha256") != _checksum(metadata["cache"], tensors):
        raise CacheError(f"{path}: expected the checksum of its contents, got another: no cache, or it is corrupt")
    about = json.loads(metadata["cache"])
    if about["format"] != FORMAT or about["class"] not in _CACHES:
        raise CacheError(f"{path}: expected {FORMAT!r}, got {about['format']!r} with a {about['class']}")
    if fingerprint is not None and about["fingerprint"] != fingerprint:
        raise CacheError(
            f"{path}: expected a cache of the model with fingerprint {fingerprint or 'none'}, "
            f"got one of {about['fingerprint'] or 'none'}; prefill the text again"
        )
    cls: Any = _CACHES[about["class"]]
    known = {field.name for field in dataclasses.fields(cls)}
    if known != about["fields"].keys():
        raise CacheError(f"{path}: expected the fields {sorted(known)}, got {sorted(about['fields'])}")
    return cls(**{name: _build(value, tensors) for name, value in about["fields"].items()})


def _describe(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """A value of a field as JSON, its arrays put into `tensors` under names that start with `name`."""
    if isinstance(value, jax.Array):
        array = np.asarray(value)
        tensors[name] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # safe for every dtype
        return {"tensor": name, "dtype": str(array.dtype), "shape": list(array.shape)}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        items = [_describe(item, f"{name}.{key}", tensors) for key, item in zip(names, value, strict=True)]
        return {"group": type(value).__name__ if hasattr(value, "_fields") else "tuple", "items": items}
    return {"value": value}


def _build(description: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The opposite of `_describe`."""
    if "tensor" in description:
        array = tensors[description["tensor"]].view(jax.numpy.dtype(description["dtype"]))
        return jax.device_put(array.reshape(description["shape"]).copy())
    if "group" in description:
        items = [_build(item, tensors) for item in description["items"]]
        return tuple(items) if description["group"] == "tuple" else _GROUPS[description["group"]](*items)
    return description["value"]


def _checksum(about: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: expected a file that save_cache wrote ({error})") from None


def _write_atomically(path: Path, content: bytes) -> None:
    try:
        with _temporary(path) as (descriptor, name):
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
    except OSError as error:
        raise CacheError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, str]]:
    """A new file beside the path, which is gone when the context ends unless it was renamed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        yield descriptor, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
