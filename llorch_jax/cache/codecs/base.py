"""The protocol of codecs: how a layout's vectors, one per token and head, are stored."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

# A pytree of arrays with the layout's leading axes, such as [B, K, S], and one more axis that the codec adds.
Stored = Any


@runtime_checkable
class Codec(Protocol):
    """How vectors of `head_dim` elements are stored; hashable, so that it can be static in `jit`.

    A layout says where a slot lives, a codec how the vector in it is stored: any layout takes any codec. The result of
    `encode` has the same leading axes as its input, so that layouts can move slots without knowing what they hold.

    Attributes:
        name: the name for `make_codec`.
        head_dim: number of elements H of a vector.
        dtype: dtype of decoded vectors.
        lossless: whether decoding returns float32 vectors unchanged.
        exact_append: whether the queries of an append see the tokens of that append exactly rather than as stored.
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
        """Bits per element, including scales."""
        ...

    def zeros(self, leading: tuple[int, ...]) -> Stored:
        """Storage for vectors [*leading, H]."""
        ...

    def encode(self, x: jax.Array) -> Stored:
        """The stored form of vectors [..., H] of any float dtype."""
        ...

    def decode(self, stored: Stored) -> jax.Array:
        """Stored vectors as `dtype` [..., H]."""
        ...
