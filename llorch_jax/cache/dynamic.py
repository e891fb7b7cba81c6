"""DynamicCache: a static cache that starts small and grows on the host, between jitted segments."""

from collections.abc import Hashable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.buckets import SMALLEST, bucket
from llorch_jax.cache.base import active_rows, check_room, check_sizes, join_rows
from llorch_jax.cache.static import StaticCache, empty_slots
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete


@struct.dataclass
class DynamicCache(StaticCache):
    """Keys and values in buffers that grow with the longest row; slot s of a row holds the token at position s.

    `reserve` grows the buffers to the next bucket of slots (`buckets.bucket`). Each bucket is at least a third larger
    than the one before, so that filling a cache copies less than three times its final size, and each is compiled
    once. Attention costs what the bucket has of slots. `crop` and `clear` keep the buffers.

    Attributes:
        keys: L arrays [B, K, S, H].
        values: L arrays [B, K, S, H].
        lengths: int32 [B], tokens in each row.
        limit: the largest number of slots S.
    """

    limit: int = struct.field(pytree_node=False)

    @classmethod
    def init(
        cls,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        initial: int = SMALLEST,
        dtype: Any = "float32",
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            capacity: upper limit of tokens per row, at most `config.n_positions`, which is the default.
            initial: tokens per row for which there are slots from the start; rounded up to a bucket, and no more than
                the capacity.
            dtype: of keys and values as stored: float32, bfloat16 or float16. Attention computes in float32.

        Raises:
            CacheError: the batch size, initial size or dtype is impossible.
            CapacityError: the capacity is not in 1 .. n_positions.
        """
        capacity = config.n_positions if capacity is None else capacity
        check_sizes(config, batch_size, capacity)
        if type(initial) is not int or initial < 1:
            raise CacheError(f"initial: expected a whole number from 1 up, got {initial!r}")
        return cls(**empty_slots(config, batch_size, bucket(initial, capacity), dtype), limit=capacity)

    @property
    def capacity(self) -> int:
        return self.limit

    @property
    def slots_in_jit(self) -> int:
        return self.slots

    def reserve(self, count: Any) -> Self:
        """The cache, with larger buffers where `count` (int or int32 [B]) more tokens per row need them.

        Call it on the host; in `jit` it does nothing.

        Raises:
            CapacityError: a row would be longer than the limit.
        """
        self.check_room(count)
        if not is_concrete(self.lengths, count):
            return self
        return self._grown(int(np.max(np.asarray(self.lengths) + np.asarray(count))))

    def room(self, active: Any = None) -> int:
        """How many tokens the active rows, bool [B], can be given before the buffers must grow. Host only."""
        return self.slots - int(np.max(active_rows(self.lengths, active)))

    def advance(self, count: Any) -> Self:
        check_room(self.lengths, count, self.slots)  # more cannot have been written
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def join(self, others: Sequence[Self]) -> Self:
        """As `KVCache.join`; buffers grow to the largest bucket among the caches."""
        caches = (self, *others)
        slots = max(cache.slots for cache in caches)
        if any(cache.limit != self.limit for cache in others):
            return join_rows(caches)  # raises, and names both limits
        return join_rows([cache._grown(slots) for cache in caches])

    def allocation(self) -> Hashable:
        """As `KVCache.allocation`; the present size of the buffers does not matter."""
        return jax.tree.structure(self), self.batch_size, self.layout, self.keys[0].dtype.name

    def _grown(self, needed: int) -> Self:
        """The cache with at least so many slots per row."""
        if needed <= self.slots:
            return self
        more = ((0, 0), (0, 0), (0, bucket(needed, self.limit) - self.slots), (0, 0))
        keys, values = (tuple(jnp.pad(array, more) for array in arrays) for arrays in (self.keys, self.values))
        return self.replace(keys=keys, values=values)
