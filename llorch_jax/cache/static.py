"""StaticCache: one preallocated buffer per layer, written in place."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from llorch_jax.attention import KVView
from llorch_jax.cache.base import KVCache, check_rows, check_sizes, cropped, replace_item
from llorch_jax.cache.codecs.floats import dtype_of, from_stored, to_stored, zeros
from llorch_jax.config import GPT2Config


@struct.dataclass
class StaticCache(KVCache):
    """Keys and values in fixed buffers; slot s of a row holds the token at position s.

    Attributes:
        keys: L arrays [B, K, S, H]; bfloat16 as its bits, uint16, see `storage`.
        values: L arrays [B, K, S, H], likewise.
        lengths: int32 [B], tokens in each row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @classmethod
    def init(
        cls, config: GPT2Config, *, batch_size: int = 1, capacity: int | None = None, dtype: Any = "float32"
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            capacity: slots per row S, at most `config.n_positions`, which is the default.
            dtype: of keys and values as stored: float32, bfloat16 or float16. Attention computes in float32.

        Raises:
            CacheError: the batch size or dtype is impossible.
            CapacityError: the capacity is not in 1 .. n_positions.
        """
        capacity = config.n_positions if capacity is None else capacity
        check_sizes(config, batch_size, capacity)
        return cls(**empty_slots(config, batch_size, capacity, dtype))

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def slots(self) -> int:
        """Slots per row S that are allocated."""
        return self.keys[0].shape[2]

    @property
    def capacity(self) -> int:
        return self.slots

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values: float32, bfloat16 or float16."""
        return dtype_of(self.keys[0])

    @property
    def layout(self) -> tuple[int, int, int]:
        _, heads, _, head_dim = self.keys[0].shape
        return len(self.keys), heads, head_dim

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        # Padding needs no care here: it lands behind the row's end, where the next token overwrites it.
        return self.replace(
            keys=replace_item(self.keys, layer, write_rows(self.keys[layer], k, self.lengths)),
            values=replace_item(self.values, layer, write_rows(self.values[layer], v, self.lengths)),
        )

    def read(self, layer: int) -> KVView:
        keys, values = from_stored(self.keys[layer]), from_stored(self.values[layer])
        return KVView(keys, values, jnp.arange(self.slots, dtype=jnp.int32)[None])

    def advance(self, count: Any) -> Self:
        self.check_room(count)
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def crop(self, length: Any) -> Self:
        return self.replace(lengths=cropped(self.lengths, length))

    def select(self, rows: Any) -> Self:
        index = check_rows(rows, self.batch_size)
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0), self)


def empty_slots(config: GPT2Config, batch_size: int, slots: int, dtype: Any) -> dict[str, Any]:
    """The fields `keys`, `values` and `lengths` of an empty cache with so many slots per row."""
    shape = (batch_size, config.kv_heads, slots, config.head_dim)
    return {
        "keys": tuple(zeros(shape, dtype) for _ in range(config.cache_layers)),
        "values": tuple(zeros(shape, dtype) for _ in range(config.cache_layers)),
        "lengths": jnp.zeros(batch_size, jnp.int32),
    }


def write_rows(buffer: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """Writes each row's new tokens into its slots from `starts` on.

    Where fewer than T slots are left, the tokens that fit are written and the others, which must be padding, dropped.

    Args:
        buffer: [B, K, S, H].
        new: [B, T, K, H].
        starts: int32 [B].
    """
    new = to_stored(new, buffer).transpose(0, 2, 1, 3)  # [B, K, T, H]
    if new.shape[2] > buffer.shape[2]:
        new = new[:, :, : buffer.shape[2]]

    def write(row: Any, filled: jax.Array) -> jax.Array:
        block, start = lax.dynamic_slice_in_dim(new, row, 1), starts[row]
        if new.shape[2] > 1:
            return _write_clipped(filled, block, row, start)
        # A full row gets padding only, which must not land on its last token. With `cond`, unlike without, XLA also
        # writes in place where there is one row and one head.
        fits = start < filled.shape[2]
        return lax.cond(fits, lambda: lax.dynamic_update_slice(filled, block, (row, 0, start, 0)), lambda: filled)

    if buffer.shape[0] == 1:
        return write(0, buffer)
    return lax.fori_loop(0, buffer.shape[0], write, buffer)


def _write_clipped(buffer: jax.Array, block: jax.Array, row: Any, start: jax.Array) -> jax.Array:
    """`dynamic_update_slice` of block [1, K, T, H] that drops what lies past the end instead of moving the start."""
    _, heads, count, head_dim = block.shape
    first = jnp.minimum(start, buffer.shape[2] - count)
    shift = start - first  # > 0 only where padding reaches past the end
    old = lax.dynamic_slice(buffer, (row, 0, first, 0), (1, heads, count, head_dim))
    kept = jnp.arange(count)[None, None, :, None] < shift
    return lax.dynamic_update_slice(buffer, jnp.where(kept, old, jnp.roll(block, shift, axis=2)), (row, 0, first, 0))
