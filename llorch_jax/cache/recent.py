"""Recent: the newest tokens of a row in float32, in addition to their lossy codes."""

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.cache.axes import array
from llorch_jax.cache.writes import ring_positions, write_ring


@struct.dataclass
class Recent:
    """The newest tokens of one layer in float32, in a ring: position p in slot p % R.

    Rings are the same for every layout, as they are indexed by position. A slot is read only for the position with
    which it is marked, so nothing overwritten is read after `crop`.

    Attributes:
        keys: float32 [B, K, R, H].
        values: float32 [B, K, R, H].
        positions: int32 [B, R], of the token in each slot; -1 if it is empty.
    """

    keys: jax.Array = array("BKR")
    values: jax.Array = array("BKR")
    positions: jax.Array = array("BR")

    @classmethod
    def empty(cls, batch_size: int, heads: int, residual: int, head_dim: int) -> Self:
        """An empty ring for `residual` tokens R per row."""
        shape = (batch_size, heads, residual, head_dim)
        marks = jnp.full((batch_size, residual), -1, jnp.int32)
        return cls(keys=jnp.zeros(shape, jnp.float32), values=jnp.zeros(shape, jnp.float32), positions=marks)

    def written(self, k: jax.Array, v: jax.Array, starts: jax.Array, count: jax.Array) -> "Recent":
        """The ring after writing `count` [B] of the tokens k and v [B, T, K, H] from positions `starts` [B] on."""
        newest = ring_positions(starts + count, self.positions.shape[1])
        fresh = newest >= starts[:, None]
        return Recent(
            keys=write_ring(self.keys, k.astype(jnp.float32), starts, count),
            values=write_ring(self.values, v.astype(jnp.float32), starts, count),
            positions=jnp.where(fresh, newest, self.positions),
        )
