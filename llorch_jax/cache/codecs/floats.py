"""How keys and values are stored: float32, float16, or bfloat16 as its bits.

XLA's CPU backend converts a whole bfloat16 array to float32 and back to update a slice of it. Arrays of bfloat16 are
therefore kept as uint16, in which a slice is written in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llorch_jax.errors import CacheError


def storage_dtype(dtype: Any) -> jnp.dtype:
    """The dtype that keys and values are stored in: float32, bfloat16 or float16."""
    names = ("float32", "bfloat16", "float16")
    try:
        stored = jnp.dtype(dtype)
    except TypeError:
        stored = None
    if stored is None or stored.name not in names:
        raise CacheError(f"dtype: expected one of {', '.join(names)}; got {dtype!r}")
    return stored


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros as they are stored.

    Raises:
        CacheError: the dtype is none of those above.
    """
    stored = storage_dtype(dtype)
    return jnp.zeros(shape, jnp.uint16 if stored == jnp.bfloat16 else stored)


def dtype_of(stored: jax.Array) -> jnp.dtype:
    """The dtype of what an array stores."""
    return jnp.dtype(jnp.bfloat16) if stored.dtype == jnp.uint16 else stored.dtype


def to_stored(values: jax.Array, like: jax.Array) -> jax.Array:
    """Keys or values of any float dtype in the form in which another array stores them."""
    return as_bits(values.astype(dtype_of(like)))


def as_bits(values: jax.Array) -> jax.Array:
    """Keys or values of a dtype that can be stored, as they are stored."""
    return lax.bitcast_convert_type(values, jnp.uint16) if values.dtype == jnp.bfloat16 else values


def from_stored(stored: jax.Array) -> jax.Array:
    """Keys or values in the dtype that they have."""
    return lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored
