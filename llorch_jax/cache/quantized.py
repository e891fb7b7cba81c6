"""QuantizedCache: a static cache whose codec is int8 or int4."""

from typing import Any, Self

from flax import struct

from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError


@struct.dataclass(repr=False)
class QuantizedCache(StaticCache):
    """A `StaticCache` with keys and values rounded to integers, and the newest tokens also in float32.

    This names the most common of many combinations: every layout takes every codec, see `codecs.IntegerCodec`. As long
    as no row is longer than `residual` tokens, results are those of a float32 cache. After `crop`, tokens that the
    float window no longer holds are read from the integers.
    """

    @classmethod
    def init(
        cls,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        bits: int = 8,
        residual: int | None = None,
        **settings: Any,
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            capacity: slots per row S, at most `config.n_positions`, which is the default.
            bits: per element of keys and values, 8 or 4.
            residual: number of newest tokens also kept in float32, 0 .. capacity; 32 by default, or the capacity if
                that is less.
            settings: refused; the codec follows from `bits`.

        Raises:
            CacheError: the batch size, bits or residual is invalid.
            CapacityError: the capacity is not in 1 .. n_positions.
        """
        if settings:
            name, value = next(iter(settings.items()))
            raise CacheError(f"{name}: expected bits=8 or bits=4 to say how a QuantizedCache stores, got {value!r:.80}")
        if type(bits) is not int or bits not in (4, 8):
            raise CacheError(f"bits: expected 8 or 4, got {bits!r:.80}")
        return super().init(config, batch_size=batch_size, capacity=capacity, codec=f"int{bits}", residual=residual)

    @property
    def bits(self) -> int:
        """Bits per element of keys and values, without scales."""
        return int(self.codec.name.removeprefix("int"))
