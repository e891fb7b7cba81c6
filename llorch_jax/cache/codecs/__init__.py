"""How the keys and values of a cache are stored: float32, bfloat16, float16, int8 or int4, in any layout."""

from typing import Any

from llorch_jax.cache.codecs.base import Codec, Stored
from llorch_jax.cache.codecs.floats import FLOATS, FloatCodec, float_name
from llorch_jax.cache.codecs.integers import IntegerCodec, Quantized, dequantize, quantize
from llorch_jax.errors import CacheError
from llorch_jax.tracing import whole

RESIDUAL = 32  # default number of newest tokens that integer codecs also keep in float32
CODECS = (*FLOATS, "int8", "int4")

__all__ = [
    "CODECS",
    "RESIDUAL",
    "Codec",
    "FloatCodec",
    "IntegerCodec",
    "Quantized",
    "Stored",
    "codec_of",
    "dequantize",
    "make_codec",
    "quantize",
    "residual_of",
]


def make_codec(codec: Any, head_dim: int, dtype: Any = "float32") -> Codec:
    """A codec for vectors of `head_dim` elements.

    Args:
        codec: a name of `CODECS`; None for floating point of `dtype`; or a custom `Codec`.
        head_dim: number of elements H of a vector.
        dtype: float32, bfloat16 or float16, if `codec` is None.

    Raises:
        CacheError: there is no such codec or dtype, or the codec is for another head_dim.
    """
    if codec is None:
        return FloatCodec(float_name(dtype), head_dim)
    if isinstance(codec, str) and codec in FLOATS:
        return FloatCodec(codec, head_dim)
    if isinstance(codec, str) and codec in CODECS:
        return IntegerCodec(int(codec.removeprefix("int")), head_dim)
    if not isinstance(codec, Codec):
        raise CacheError(f"codec: expected one of {', '.join(CODECS)}; got {codec!r:.80}")
    if codec.head_dim != head_dim:
        raise CacheError(f"codec: expected one for a head_dim of {head_dim}, as the model has, got {codec.head_dim}")
    return codec


def residual_of(codec: Codec, residual: Any, capacity: int) -> int:
    """Number of newest tokens that are also kept in float32.

    Args:
        codec: how the others are stored.
        residual: the requested number; None means `RESIDUAL`, or the capacity if that is less, for integer codecs and 0
            for others.
        capacity: number of tokens that a row can hold.

    Raises:
        CacheError: the number is invalid, or the codec is lossless.
    """
    if residual is None:
        return min(RESIDUAL, capacity) if codec.exact_append else 0
    count = whole("residual", residual, CacheError, least=0, most=capacity)
    if count and codec.lossless:
        raise CacheError(f"residual: expected 0 with {codec.name}, which is exact anyway, got {count}")
    return count


def codec_of(stored: Stored, head_dim: int | None = None) -> Codec:
    """The codec that made stored vectors; `head_dim` is needed if 4-bit codes may hold an odd number of elements."""
    if isinstance(stored, Quantized):
        bits = 8 if stored.zero is None else 4
        elements = stored.codes.shape[-1] * (8 // bits)
        return IntegerCodec(bits, elements if head_dim is None else head_dim)
    name = "bfloat16" if stored.dtype == "uint16" else stored.dtype.name
    return FloatCodec(name, stored.shape[-1])
