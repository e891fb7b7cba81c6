"""RotatingCache: a ring of the newest tokens, plus the first tokens of the row."""

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.attention import DenseView, KVView
from llorch_jax.cache.axes import array, setting
from llorch_jax.cache.base import KVCache, replace_item
from llorch_jax.cache.codecs import Codec, Stored, make_codec, residual_of
from llorch_jax.cache.fields import check_range, check_whole_numbers
from llorch_jax.cache.recent import Recent
from llorch_jax.cache.room import check_new_tokens, check_sizes, cropped
from llorch_jax.cache.static import empty_slots, slots_of
from llorch_jax.cache.views import SlotView
from llorch_jax.cache.writes import ring_positions, write_ring
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete, whole


@struct.dataclass(repr=False)
class RotatingCache(KVCache):
    """Keys and values of the newest tokens in a ring (the rolling buffer of Mistral 7B, Jiang et al. 2023, section 2).

    A query at position i attends to positions i - window + 1 .. i and to the first `sinks` positions (attention sinks,
    Xiao et al. 2024, 2309.17453). Every token keeps its position embedding: unlike StreamingLLM, this does not renumber
    tokens, so a row ends at n_positions. Memory and the cost of a step depend only on sinks + window.

    Position p is in slot p if p < sinks, else in slot sinks + (p - sinks) % window.

    Attributes:
        keys: for each of L layers, stored keys [B, K, S, ...], S = sinks + window.
        values: for each of L layers, stored values.
        lengths: int32 [B], tokens in each row.
        ends: int32 [B, L], one more than the highest position written to each layer's ring, which determines what
            each slot holds. It exceeds `lengths` where tokens have been written but not yet counted by `advance`, or
            have been rolled back: those have overwritten older ones.
        recent, codec: as in `StaticCache`.
        window: number of newest tokens attended to, including the query's own.
        sinks: number of first tokens attended to in addition.
        limit: maximum number of tokens in a row, the model's n_positions.
    """

    keys: tuple[Stored, ...] = array("BKS")
    values: tuple[Stored, ...] = array("BKS")
    lengths: jax.Array = array("B")
    ends: jax.Array = array("BL")
    recent: tuple[Recent, ...] = ()
    codec: Codec = setting(kw_only=True)
    window: int = setting(kw_only=True)
    sinks: int = setting(kw_only=True)
    limit: int = setting(kw_only=True)

    @classmethod
    def init(
        cls,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        window: int,
        sinks: int = 0,
        dtype: Any = "float32",
        codec: Any = None,
        residual: int | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            window: number of newest tokens kept, including the current one. A window beyond `config.n_positions` keeps
                everything, in n_positions slots.
            sinks: number of first tokens of a row kept in addition, less than `config.n_positions`.
            dtype, codec, residual: how keys and values are stored; as in `StaticCache.init`.

        Raises:
            CacheError: the batch size, window, sinks, dtype, codec or residual is invalid.
        """
        limit = config.n_positions
        check_sizes(config, batch_size, limit)
        sinks = whole("sinks", sinks, CacheError, least=0, most=limit - 1)
        window = min(whole("window", window, CacheError), limit - sinks)
        stored_as = make_codec(codec, config.head_dim, dtype)
        exact = residual_of(stored_as, residual, sinks + window)
        return cls(
            **empty_slots(config, batch_size, sinks + window, stored_as, exact),
            ends=jnp.zeros((batch_size, config.cache_layers), jnp.int32),
            window=window,
            sinks=sinks,
            limit=limit,
        )

    def check_fields(self) -> None:
        super().check_fields()
        check_whole_numbers(self, {"sinks": 0, "window": 1, "limit": self.sinks + self.window})
        if slots_of(self) != self.sinks + self.window:
            raise CacheError(f"keys: expected {self.sinks} + {self.window} slots, got {slots_of(self)}")
        check_range("ends", self.ends, np.asarray(self.lengths)[:, None], self.limit)
        self._check_intact(self.lengths, self.ends)

    @property
    def capacity(self) -> int:
        return self.limit

    def can_roll_back(self, count: Any) -> bool:
        """As `KVCache.can_roll_back`: False if the ring would overwrite tokens."""
        return bool(np.all(np.asarray(self.lengths) + np.asarray(count) <= self.sinks + self.window))

    def keeps_all(self, tokens: int) -> bool:
        return tokens <= self.sinks + self.window

    def update(self, layer: int, k: jax.Array, v: jax.Array, count: Any = None) -> Self:
        """As `KVCache.update`. Queries of more than one new token need the view that `append` returns.

        Raises:
            CacheError: the layer does not exist, a shape is wrong, or tokens written to this layer that `advance` has
                not counted have overwritten tokens that the row still needs.
            CapacityError: a row has no room for the tokens.
        """
        check_new_tokens(layer, k, v, self.batch_size, self.dims, count)
        self.check_room(k.shape[1] if count is None else count)
        self._check_intact(self.lengths, self.ends[:, layer : layer + 1])
        return self._append(layer, k, v, count)

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        counts = self._counts(k, count)

        def written(stored: Stored, new: jax.Array) -> Stored:
            codes = self.codec.encode(new)
            return jax.tree.map(
                lambda ring, part: write_ring(ring, part, self.lengths, counts, self.sinks), stored, codes
            )

        keys = written(self.keys[layer], k)
        values = written(self.values[layer], v)
        after = jnp.maximum(self.ends, (self.lengths + counts)[:, None])
        is_written = jnp.arange(len(self.keys))[None] == layer
        return self.replace(
            keys=replace_item(self.keys, layer, keys),
            values=replace_item(self.values, layer, values),
            ends=jnp.where(is_written, after, self.ends),
        )

    def read(self, layer: int) -> SlotView:
        """The ring in its current state: after `update` with several tokens, what the last of them may attend to."""
        positions = ring_positions(self.ends[:, layer], self.window, self.sinks)
        return SlotView(
            self.keys[layer],
            self.values[layer],
            positions,
            self._exact(layer),
            codec=self.codec,
            window=self.window,
            sinks=self.sinks,
        )

    def _own_view(self, k: jax.Array, v: jax.Array) -> DenseView:
        view = super()._own_view(k, v)
        return view.replace(window=self.window, sinks=self.sinks)

    def _view_after(self, cache: Self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> KVView:
        """As `KVCache._view_after`. For more than one token the view is the old ring followed by the new tokens.

        The first of these still attend to old tokens that the last of them overwrite.
        """
        if k.shape[1] == 1:
            return super()._view_after(cache, layer, k, v, count)
        # The float window after the append: tokens that have left it are seen as stored.
        old = self.read(layer).replace(exact=cache._exact(layer)).dense()
        held = jnp.where(old.positions < self.lengths[:, None], old.positions, -1)
        steps = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        real = steps < self._counts(k, count)[:, None]
        new = jnp.where(real, self.lengths[:, None] + steps, -1)
        return old.replace(
            k=jnp.concatenate([old.k, self._own(k).astype(old.k.dtype)], axis=2),
            v=jnp.concatenate([old.v, self._own(v).astype(old.v.dtype)], axis=2),
            positions=jnp.concatenate([held, new], axis=1),
        )

    def reserve(self, count: Any, *, lengths: Any = None, pinned: Any = ()) -> Self:
        self.check_room(count, lengths=lengths)
        self._check_intact(self.lengths if lengths is None else lengths, self.ends)
        return self

    def crop(self, length: Any) -> Self:
        """As `KVCache.crop`, as long as the ring still holds what the shorter row needs.

        This is the case until a row exceeds sinks + window tokens. After that, a row can be cropped only by one token,
        or to `sinks` tokens or fewer.

        Raises:
            CacheError: tokens that the shorter row needs have been overwritten. In `jit` this cannot be known: the
                next `reserve` or `update` raises it.
        """
        lengths = cropped(self.lengths, length)
        self._check_intact(lengths, self.ends)
        left = lengths[:, None]
        unturned = (left <= self.sinks) | (self.ends <= self.sinks + self.window)
        return self.replace(lengths=lengths, ends=jnp.where(unturned, jnp.minimum(self.ends, left), self.ends))

    def _check_intact(self, lengths: Any, ends: Any) -> None:
        """Raises CacheError if rings written up to `ends` [B, L'] lack tokens that rows of `lengths` [B] need.

        The next query, at position n, needs the first `sinks` positions and n - window + 1 .. n - 1; a ring written up
        to `end` has lost those from `sinks` on that are below end - window.
        """
        if not is_concrete(lengths, ends):
            return
        known = np.asarray(lengths)
        end = np.asarray(ends).max(axis=1)
        lost = (known < end - 1) & (known > self.sinks) & (end > self.sinks + self.window)
        if lost.any():
            row = int(np.argmax(lost))
            raise CacheError(
                f"cache: row {row} cannot continue from {known[row]} tokens: its ring (window={self.window}, "
                f"sinks={self.sinks}) was written up to token {end[row]}, over tokens that the next one attends to; "
                f"expected {end[row] - 1} tokens or more, or {self.sinks} or fewer"
            )
