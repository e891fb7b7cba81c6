"""What queries may attend to: stored vectors, overlaid with exact vectors of some of the tokens."""

import abc

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.attention import DenseView, KVView
from llorch_jax.cache.codecs import Codec, Stored


@struct.dataclass
class Exact:
    """Unrounded vectors of some tokens; the token at position p has index (p - start) % R.

    Attributes:
        keys: [B, K, R, H].
        values: [B, K, R, H].
        positions: int32 [B, R], the position of the token at each index; an index with another position is unused.
        start: int32 [B]; None for 0.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    start: jax.Array | None = None

    def over(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, H] of slots that hold `positions`, replaced by exact ones where these are known.

        Args:
            keys: as stored.
            values: as stored.
            positions: int32 [B, S] or [1, S], or [B, K, S].
        """
        batch, heads = keys.shape[:2]
        by_head = positions[:, None] if positions.ndim == 2 else positions
        start = 0 if self.start is None else self.start[:, None, None]
        number = (by_head - start) % self.positions.shape[1]  # [B or 1, K or 1, S]
        marks = jnp.broadcast_to(self.positions[:, None], (batch, number.shape[1], self.positions.shape[1]))
        number = jnp.broadcast_to(number, (batch, *number.shape[1:]))
        known = jnp.take_along_axis(marks, number, axis=2) == by_head
        index = number[..., None]

        def chosen(exact: jax.Array, stored: jax.Array) -> jax.Array:
            found = jnp.take_along_axis(exact, jnp.broadcast_to(index, (batch, heads, *index.shape[2:])), axis=2)
            return jnp.where(known[..., None], found.astype(stored.dtype), stored)

        return chosen(self.keys, keys), chosen(self.values, values)


class StoredView(KVView):
    """Vectors as a codec stores them, in the slots of a layout.

    Attributes:
        positions: int32 [B, S], [1, S] or [B, K, S]; see `DenseView`.
        exact: exact vectors of some tokens; later items take precedence.
        codec: of the stored vectors.
        window: see `DenseView`.
        sinks: see `DenseView`.
    """

    positions: jax.Array
    exact: tuple[Exact, ...]
    codec: Codec
    window: int | None
    sinks: int

    @abc.abstractmethod
    def slots(self) -> tuple[Stored, Stored]:
        """Stored keys and values with the leading axes [B, K, S]."""

    @jax.named_scope("cache_read")
    def dense(self) -> DenseView:
        keys, values = (self.codec.decode(stored) for stored in self.slots())
        if self.exact:
            keys = keys.astype(jnp.float32)
            values = values.astype(jnp.float32)
        for exact in self.exact:
            keys, values = exact.over(keys, values, self.positions)
        return DenseView(keys, values, self.positions, self.window, self.sinks)


@struct.dataclass
class SlotView(StoredView):
    """Stored vectors in arrays of slots.

    Attributes:
        keys: stored, with the leading axes [B, K, S].
        values: stored, with the leading axes [B, K, S].
    """

    keys: Stored
    values: Stored
    positions: jax.Array
    exact: tuple[Exact, ...] = ()
    codec: Codec = struct.field(pytree_node=False, kw_only=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    sinks: int = struct.field(pytree_node=False, default=0)

    def slots(self) -> tuple[Stored, Stored]:
        return self.keys, self.values
