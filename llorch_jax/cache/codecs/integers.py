"""IntegerCodec: vectors as 8-bit or 4-bit integers with one scale per vector."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
    """Vectors [..., H] as integers, with one scale per vector.

    Attributes:
        codes: int8 [..., H] at 8 bits; uint8 [..., ceil(H / 2)] at 4 bits, element i in the low nibble of byte i and
            element i + ceil(H / 2) in its high nibble.
        scale: float32 [..., 1], the difference between neighbouring codes; 0 if all elements are equal.
        zero: float32 [..., 1], the value of code 0; None at 8 bits, where it is 0.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


@dataclasses.dataclass(frozen=True)
class IntegerCodec:
    """Vectors rounded to integers.

    At 8 bits the codes are symmetric, -127 .. 127 times absmax / 127; at 4 bits asymmetric, the minimum plus 0 .. 15
    times range / 15, which diverges from float32 a quarter less than symmetric codes. The error of an element is at
    most half a scale. KIVI (Liu et al. 2024, 2402.02750) scales keys per channel over groups of tokens, which is more
    exact but ties writes to group boundaries; here every token is written immediately and only once.

    The queries of an append see the tokens of that append exactly, so a prompt that is read at once into an empty cache
    is exact.

    Attributes:
        bits: 8 or 4.
        head_dim: number of elements H of a vector.
    """

    bits: int
    head_dim: int
    lossless: ClassVar[bool] = False
    exact_append: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    @property
    def bits_per_element(self) -> float:
        stored = jax.eval_shape(lambda: self.zeros(()))
        return 8.0 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored)) / self.head_dim

    def zeros(self, leading: tuple[int, ...]) -> Quantized:
        """Codes and scales of vectors of zeros [*leading, H]."""
        scale = jnp.zeros((*leading, 1), jnp.float32)
        if self.bits == 8:
            return Quantized(jnp.zeros((*leading, self.head_dim), jnp.int8), scale, None)
        codes = jnp.zeros((*leading, (self.head_dim + 1) // 2), jnp.uint8)
        return Quantized(codes, scale, jnp.zeros((*leading, 1), jnp.float32))

    def encode(self, x: jax.Array) -> Quantized:
        """Codes and scales of vectors [..., H]: see `quantize`."""
        return quantize(x, self.bits)

    def decode(self, stored: Quantized) -> jax.Array:
        """float32 [..., H]."""
        return dequantize(stored, self.head_dim)


def quantize(x: jax.Array, bits: int) -> Quantized:
    """Vectors [..., H] of any float dtype, with one scale each, at 8 bits (symmetric) or 4 bits (asymmetric).

    The error of an element is at most half a scale. Elements must be finite and less than half of float32's maximum.
    """
    x = x.astype(jnp.float32)
    if bits == 8:
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return Quantized(_rounded(x, scale, -127, 127).astype(jnp.int8), scale, None)
    zero = jnp.min(x, axis=-1, keepdims=True)
    scale = (jnp.max(x, axis=-1, keepdims=True) - zero) / 15
    codes = _rounded(x - zero, scale, 0, 15).astype(jnp.uint8)
    codes = jnp.pad(codes, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
    low, high = jnp.split(codes, 2, axis=-1)
    return Quantized(low | (high << 4), scale, zero)


def dequantize(stored: Quantized, head_dim: int) -> jax.Array:
    """float32 [..., H] of quantized vectors; `head_dim` H is needed if it is odd."""
    if stored.zero is None:
        return stored.codes.astype(jnp.float32) * stored.scale
    codes = jnp.concatenate([stored.codes & 15, stored.codes >> 4], axis=-1)[..., :head_dim]
    return codes.astype(jnp.float32) * stored.scale + stored.zero


def _rounded(x: jax.Array, scale: jax.Array, low: int, high: int) -> jax.Array:
    return jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1)), low, high)
