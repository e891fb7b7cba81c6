"""DynamicCache: a static cache that starts small and grows on the host, between jitted segments."""

from collections.abc import Hashable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.buckets import SMALLEST, bucket
from llorch_jax.cache.axes import grow_slots, setting
from llorch_jax.cache.codecs import make_codec, residual_of
from llorch_jax.cache.fields import check_range, check_whole_numbers
from llorch_jax.cache.room import check_room, check_sizes
from llorch_jax.cache.static import StaticCache, empty_slots
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete, whole


@struct.dataclass(repr=False)
class DynamicCache(StaticCache):
    """Keys and values in buffers that grow with the longest row; slot s of a row holds the token at position s.

    `reserve` grows the buffers to the next bucket of slots (`buckets.bucket`). Each bucket is at least a third larger
    than the one before, so that filling a cache copies less than three times its final size, and each is compiled
    once. The cost of attention follows the slots of the bucket. `crop` and `clear` keep the buffers.

    Attributes:
        keys, values, lengths, recent, codec: as in `StaticCache`.
        limit: maximum number of slots S.
    """

    limit: int = setting(kw_only=True)

    @classmethod
    def init(
        cls,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        initial: int = SMALLEST,
        dtype: Any = "float32",
        codec: Any = None,
        residual: int | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            capacity: maximum number of tokens per row, at most `config.n_positions`, which is the default.
            initial: number of tokens per row for which slots are allocated at first; rounded up to a bucket, and
                limited to the capacity.
            dtype, codec, residual: how keys and values are stored; as in `StaticCache.init`.

        Raises:
            CacheError: the batch size, initial size, dtype, codec or residual is invalid.
            CapacityError: the capacity is not in 1 .. n_positions.
        """
        capacity = config.n_positions if capacity is None else capacity
        check_sizes(config, batch_size, capacity)
        slots = bucket(whole("initial", initial, CacheError), capacity)
        stored_as = make_codec(codec, config.head_dim, dtype)
        window = residual_of(stored_as, residual, capacity)
        return cls(**empty_slots(config, batch_size, slots, stored_as, window), limit=capacity)

    @property
    def capacity(self) -> int:
        return self.limit

    def check_fields(self) -> None:
        super().check_fields()
        check_whole_numbers(self, {"limit": self.slots})
        check_range("lengths", self.lengths, 0, self.slots)

    def _slots_for_tokens(self) -> int:
        return self.slots

    def reserve(self, count: Any, *, lengths: Any = None, pinned: Any = ()) -> Self:
        """The cache, with larger buffers if `count` (int or int32 [B]) more tokens per row need them.

        Call it on the host; in `jit` it does nothing. Arguments as in `KVCache.reserve`.

        Raises:
            CapacityError: a row would be longer than the limit.
        """
        known = self.lengths if lengths is None else lengths
        self.check_room(count, lengths=known)
        if not is_concrete(known, count):
            return self
        return self._grown(int(np.max(np.asarray(known) + np.asarray(count))))

    def advance(self, count: Any) -> Self:
        check_room(self.lengths, count, self.slots)  # more cannot have been written
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def insert(self, slots: Any, source: Self) -> Self:
        """As `KVCache.insert`; outside `jit` the buffers grow to the source's size first."""
        return StaticCache.insert(self._grown(source.slots), slots, source)

    def join(self, others: Sequence[Self]) -> Self:
        """As `KVCache.join`; buffers grow to the largest bucket among the caches."""
        slots = max(cache.slots for cache in (self, *others))
        return StaticCache.join(self._grown(slots), [cache._grown(slots) for cache in others])

    def allocation(self) -> Hashable:
        """As `KVCache.allocation`; the current size of the buffers does not matter."""
        return jax.tree.structure(self), self.batch_size, self.dims, self.residual

    def _grown(self, needed: int) -> Self:
        """The cache with at least `needed` slots per row."""
        return self if needed <= self.slots else grow_slots(self, bucket(needed, self.limit))
