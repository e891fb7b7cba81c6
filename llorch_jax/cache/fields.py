"""Checks that the fields of a cache are consistent, after it has been read from a file."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.axes import axes_of
from llorch_jax.cache.codecs import CODECS, Codec, make_codec
from llorch_jax.errors import CacheError
from llorch_jax.tracing import whole

_FLOATS = ("votes",)  # fields that are not int32, apart from keys, values and the float window


def check_arrays(cache: Any) -> None:
    """Raises CacheError unless all arrays have the axes, sizes and dtypes that the fields of their class name.

    Args:
        cache: a cache of any layout, whose fields have the types that its class declares.
    """
    layers = len(cache.keys)
    if not layers or len(cache.values) != layers or len(cache.recent) not in (0, layers):
        raise CacheError(f"keys: expected as many layers as values, at least 1, got {layers} and {len(cache.values)}")
    _check_codec(cache.codec)
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cache)):
        raise CacheError("cache: expected arrays in all layers, got something else")
    for field in ("keys", "values"):
        for layer, stored in enumerate(getattr(cache, field)):
            _check_stored(f"{field}[{layer}]", stored, cache.codec)
    _check_axes(cache, layers)
    _check_recent(cache)


def check_whole_numbers(cache: Any, least: dict[str, int]) -> None:
    """Raises CacheError unless each of these settings is a whole number of at least the value given for it."""
    for name, smallest in least.items():
        whole(name, getattr(cache, name), CacheError, smallest, np.iinfo(np.int32).max)


def check_range(name: str, values: Any, least: Any, most: Any) -> None:
    """Raises CacheError unless least <= values <= most, all arrays that broadcast."""
    known = np.asarray(values)
    wrong = (known < np.asarray(least)) | (known > np.asarray(most))
    if wrong.any():
        place = tuple(int(index) for index in np.argwhere(wrong)[0])
        smallest = np.broadcast_to(least, known.shape)[place]
        largest = np.broadcast_to(most, known.shape)[place]
        raise CacheError(f"{name}{list(place)}: expected {smallest} .. {largest}, got {known[place]}")


def _check_codec(codec: Codec) -> None:
    name, head_dim = codec.name, whole("codec.head_dim", codec.head_dim, CacheError)
    if name not in CODECS or make_codec(name, head_dim) != codec:
        raise CacheError(f"codec: expected one of {', '.join(CODECS)}; got {name!r:.40}")


def _check_stored(name: str, stored: Any, codec: Codec) -> None:
    leaves = jax.tree.leaves(stored)
    if not leaves or leaves[0].ndim < 3:
        raise CacheError(f"{name}: expected stored vectors with three leading axes, got something else")
    expected = jax.eval_shape(lambda: codec.zeros(leaves[0].shape[:3]))
    got = jax.eval_shape(lambda: stored)
    if got != expected:
        raise CacheError(f"{name}: expected what {codec.name} stores, {_brief(expected)}, got {_brief(got)}")


def _brief(tree: Any) -> str:
    return ", ".join(f"{leaf.dtype} {list(leaf.shape)}" for leaf in jax.tree.leaves(tree))


def _check_axes(cache: Any, layers: int) -> None:
    """Checks that each letter has one size, each tuple one item per layer, and each array the dtype of its field."""
    sizes = {"L": layers, "B": cache.lengths.shape[0] if cache.lengths.ndim else 0}
    named = axes_of(cache)
    for field, value in vars(named).items():
        if isinstance(value, tuple) and len(value) not in (0, layers):
            raise CacheError(f"{field}: expected an item for each of {layers} layers, got {len(value)}")
        leaves = jax.tree.leaves(getattr(cache, field))
        own_dtype = field in ("keys", "values", "recent")
        expected = jnp.float32 if field in _FLOATS else jnp.int32
        for leaf, axes in zip(leaves, jax.tree.leaves(value), strict=False):
            if not isinstance(leaf, jax.Array):
                continue  # a setting
            if leaf.ndim < len(axes) or not (own_dtype or (leaf.dtype == expected and leaf.ndim == len(axes))):
                raise CacheError(f"{field}: expected {expected.__name__} {list(axes)}, got {leaf.dtype} {leaf.shape}")
            for letter, size in zip(axes, leaf.shape, strict=False):
                if sizes.setdefault(letter, size) != size or size < 1:
                    raise CacheError(f"{field}: expected {letter}={sizes[letter]} as in other fields, got {size}")


def _check_recent(cache: Any) -> None:
    """Checks the float window: float32 vectors, and in each slot of the ring a position that belongs there."""
    for layer, recent in enumerate(cache.recent):
        name = f"recent[{layer}]"
        size = recent.positions.shape[-1]
        shape = (*cache.lengths.shape, cache.dims[1], size, cache.codec.head_dim)
        for array in (recent.keys, recent.values):
            if array.shape != shape or array.dtype != jnp.float32:
                raise CacheError(f"{name}: expected float32 {list(shape)}, got {array.dtype} {list(array.shape)}")
        positions = np.asarray(recent.positions)
        if positions.dtype != np.int32:
            raise CacheError(f"{name}.positions: expected int32, got {positions.dtype}")
        check_range(f"{name}.positions", positions, -1, max(cache.capacity - 1, -1))
        if ((positions >= 0) & (positions % size != np.arange(size))).any():
            raise CacheError(f"{name}.positions: expected position p in slot p % {size}, got others")
