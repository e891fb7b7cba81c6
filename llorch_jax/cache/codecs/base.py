"""What a codec is: how a layout's vectors, one per token and head, are stored."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

# A pytree of arrays with the layout's leading axes, such as [B, K, S], and one more axis of the codec's own.
Stored = Any


@runtime_checkable
class Codec(Protocol):
    """How vectors of `head_dim` elements are stored; hashable, and so static in `jit`.

    A layout says where a slot lives, a codec how the vector in it is stored: any layout takes any codec. What `encode`
    returns has the same leading axes as its input, so that layouts move slots about without knowing what they hold.

    Attributes:
        name: as in `make_codec`.
        head_dim: elements H of a vector.
        dtype: of decoded vectors.
        lossless: whether float32 vectors come back as they were.
        exact_append: whether the queries of an append see the tokens of that append exactly, not as they are stored.
    """

    @property
    def name(self) -> str: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> jnp.dtype: ...
    @property
    def lossless(self) -> bool: ...
    @property
    def exact_append(self) -> bool: ...

    @property
    def bits_per_element(self) -> float:
        """Bits that one element takes, scales included."""
        ...

    def zeros(self, leading: tuple[int, ...]) -> Stored:
        """Storage for vectors [*leading, H]."""
        ...

    def encode(self, x: jax.Array) -> Stored:
        """Vectors [..., H] of any float dtype as they are stored."""
        ...

    def decode(self, stored: Stored) -> jax.Array:
        """Stored vectors as `dtype` [..., H]."""
        ...
