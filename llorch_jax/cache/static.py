"""StaticCache: one preallocated buffer per layer, written in place."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.cache.axes import array, setting
from llorch_jax.cache.base import KVCache, replace_item
from llorch_jax.cache.codecs import Codec, Stored, make_codec, residual_of
from llorch_jax.cache.recent import Recent
from llorch_jax.cache.room import check_sizes
from llorch_jax.cache.views import SlotView
from llorch_jax.cache.writes import write_rows
from llorch_jax.config import GPT2Config


@struct.dataclass(repr=False)
class StaticCache(KVCache):
    """Keys and values in fixed buffers; slot s of a row holds the token at position s.

    Attributes:
        keys: for each of L layers, stored keys [B, K, S, ...]: arrays [B, K, S, H] of floats (bfloat16 as its bits,
            uint16), or `Quantized` codes and scales.
        values: for each of L layers, stored values in the same form.
        lengths: int32 [B], tokens in each row.
        recent: for each of L layers, the newest tokens in float32; empty unless there is a float window.
        codec: how vectors are stored.
    """

    keys: tuple[Stored, ...] = array("BKS")
    values: tuple[Stored, ...] = array("BKS")
    lengths: jax.Array = array("B")
    recent: tuple[Recent, ...] = ()
    codec: Codec = setting(kw_only=True)

    @classmethod
    def init(
        cls,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        dtype: Any = "float32",
        codec: Any = None,
        residual: int | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            capacity: slots per row S, at most `config.n_positions`, which is the default.
            dtype: dtype of stored keys and values: float32, bfloat16 or float16. Attention is computed in float32.
            codec: how they are stored, instead of `dtype`: float32, bfloat16, float16, int8 or int4.
            residual: number of newest tokens that are also kept in float32, 0 .. capacity; by default 32 for int8 and
                int4, or the capacity if that is less, and 0 for the others.

        Raises:
            CacheError: the batch size, dtype, codec or residual is invalid.
            CapacityError: the capacity is not in 1 .. n_positions.
        """
        capacity = config.n_positions if capacity is None else capacity
        check_sizes(config, batch_size, capacity)
        stored_as = make_codec(codec, config.head_dim, dtype)
        window = residual_of(stored_as, residual, capacity)
        return cls(**empty_slots(config, batch_size, capacity, stored_as, window))

    @property
    def slots(self) -> int:
        """Number of allocated slots per row S."""
        return slots_of(self)

    @property
    def capacity(self) -> int:
        return self.slots

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        # Padding is harmless here: it lands after the row's end, where the next token overwrites it.
        return write_slots(self, layer, k, v, self.lengths)

    def read(self, layer: int) -> SlotView:
        positions = jnp.arange(self.slots, dtype=jnp.int32)[None]
        return SlotView(self.keys[layer], self.values[layer], positions, self._exact(layer), codec=self.codec)


def empty_slots(config: GPT2Config, batch_size: int, slots: int, codec: Codec, residual: int) -> dict[str, Any]:
    """The fields that all layouts with slots share, for an empty cache."""
    leading = (batch_size, config.kv_heads, slots)
    layers = range(config.cache_layers)
    return {
        "keys": tuple(codec.zeros(leading) for _ in layers),
        "values": tuple(codec.zeros(leading) for _ in layers),
        "recent": empty_recent(config, batch_size, residual),
        "lengths": jnp.zeros(batch_size, jnp.int32),
        "codec": codec,
    }


def empty_recent(config: GPT2Config, batch_size: int, residual: int) -> tuple[Recent, ...]:
    """The empty float windows of all layers; empty if `residual` is 0."""
    layers = range(config.cache_layers if residual else 0)
    return tuple(Recent.empty(batch_size, config.kv_heads, residual, config.head_dim) for _ in layers)


def slots_of(cache: KVCache) -> int:
    """Number of slots per row S that a layout with slots has allocated."""
    return jax.tree.leaves(cache.keys[0])[0].shape[2]


def write_slots(cache: Any, layer: int, k: jax.Array, v: jax.Array, starts: jax.Array) -> Any:
    """A cache with new tokens [B, T, K, H] of one layer written to each row's slots from `starts` int32 [B] on."""

    def written(stored: Stored, new: jax.Array) -> Stored:
        return jax.tree.map(lambda buffer, part: write_rows(buffer, part, starts), stored, cache.codec.encode(new))

    keys = written(cache.keys[layer], k)
    values = written(cache.values[layer], v)
    return cache.replace(
        keys=replace_item(cache.keys, layer, keys),
        values=replace_item(cache.values, layer, values),
    )
