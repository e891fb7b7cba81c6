"""FloatCodec: float32, float16, or bfloat16 as its bits.

XLA's CPU backend converts a whole bfloat16 array to float32 and back to update a slice of it. Arrays of bfloat16 are
therefore kept as uint16, in which a slice is written in place.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from llorch_jax.errors import CacheError

FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class FloatCodec:
    """Vectors as floating-point numbers.

    Queries see rounded values from the start, so that results do not depend on how a text is split into appends.

    Attributes:
        name: float32, bfloat16 or float16.
        head_dim: number of elements H of a vector.
    """

    name: str
    head_dim: int
    exact_append: ClassVar[bool] = False

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.name)

    @property
    def lossless(self) -> bool:
        return self.name == "float32"

    @property
    def bits_per_element(self) -> float:
        return 8.0 * self.dtype.itemsize

    def zeros(self, leading: tuple[int, ...]) -> jax.Array:
        """Zeros [*leading, H]; uint16 for bfloat16."""
        stored = jnp.uint16 if self.name == "bfloat16" else self.dtype
        return jnp.zeros((*leading, self.head_dim), stored)

    def encode(self, x: jax.Array) -> jax.Array:
        """Vectors [..., H] in the dtype in which they are stored."""
        x = x.astype(self.dtype)
        return lax.bitcast_convert_type(x, jnp.uint16) if self.name == "bfloat16" else x

    def decode(self, stored: jax.Array) -> jax.Array:
        """Vectors [..., H] in their original dtype."""
        return lax.bitcast_convert_type(stored, jnp.bfloat16) if self.name == "bfloat16" else stored


def float_name(dtype: Any) -> str:
    """The name of a dtype in which keys and values can be stored.

    Raises:
        CacheError: it is none of float32, bfloat16 and float16.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if dtype is None or name not in FLOATS:
        raise CacheError(f"dtype: expected one of {', '.join(FLOATS)}; got {dtype!r:.80}")
    return name
