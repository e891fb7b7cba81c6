"""The vectors that queries may attend to: stored ones, overlaid with the exact vectors of some tokens."""

import abc

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.attention import DenseView, KVView, Queries, attend_natively
from llorch_jax.cache.codecs import Codec, FloatCodec, IntegerCodec, Quantized, Stored
from llorch_jax.kernels import attention as kernels


@struct.dataclass
class Exact:
    """Unrounded vectors of some tokens; the token at position p has index (p - start) % R.

    Attributes:
        keys: [B, K, R, H].
        values: [B, K, R, H].
        positions: int32 [B, R], the position of the token at each index; an index with another position is unused.
        start: int32 [B]; None means 0.
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
        keys: stored keys, in the layout's own arrays.
        values: stored values, in the layout's own arrays.
        positions: int32 [B, S], [1, S] or [B, K, S]; see `DenseView`.
        exact: exact vectors of some tokens; later items take precedence.
        codec: codec of the stored vectors.
        window: see `DenseView`.
        sinks: see `DenseView`.
    """

    keys: Stored
    values: Stored
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

    def attend(self, q: jax.Array, queries: Queries, scale: float) -> jax.Array:
        """As `KVView.attend`, but for a few queries with a native kernel, which reads the slots as they are stored."""
        if not isinstance(self.codec, FloatCodec | IntegerCodec):
            return super().attend(q, queries, scale)
        form = kernels.Form(
            bits=self.codec.bits if isinstance(self.codec, IntegerCodec) else 8 * self.codec.dtype.itemsize,
            scale=scale,
            window=queries.window or 0,
            view_window=self.window or 0,
            sinks=self.sinks,
        )
        heads = jax.tree.leaves(self.keys)[0].shape[1]
        if not kernels.serves(form, q, heads, len(self.exact)):
            return super().attend(q, queries, scale)
        return attend_natively(form, q, self, queries, scale)

    def operands(self, q: jax.Array, queries: Queries) -> kernels.Operands:
        exact = (
            kernels.Exact(
                each.keys.astype(jnp.float32),
                each.values.astype(jnp.float32),
                each.positions,
                jnp.zeros(q.shape[0], jnp.int32) if each.start is None else each.start,
            )
            for each in self.exact
        )
        return kernels.Operands(
            q=q,
            query_positions=queries.positions,
            keys=_vectors(self.keys),
            values=_vectors(self.values),
            positions=self.positions[:, None] if self.positions.ndim == 2 else self.positions,
            tables=self.block_tables(),
            exact=tuple(exact),
        )

    def block_tables(self) -> jax.Array:
        """int32 [B, N], the page of each block of slots; [0, 0] if there are no pages."""
        return jnp.zeros((0, 0), jnp.int32)


def _vectors(stored: Stored) -> kernels.Vectors:
    none = jnp.zeros(0, jnp.float32)
    if isinstance(stored, Quantized):
        return kernels.Vectors(stored.codes, stored.scale, none if stored.zero is None else stored.zero)
    return kernels.Vectors(stored, none, none)


@struct.dataclass
class SlotView(StoredView):
    """Stored vectors in arrays of slots.

    Attributes:
        keys: stored keys, with the leading axes [B, K, S].
        values: stored values, with the leading axes [B, K, S].
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
