"""RotatingCache: a ring of the newest tokens, with the first tokens of the row kept beside it."""

from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from llorch_jax.attention import KVView
from llorch_jax.cache.base import KVCache, check_new_tokens, check_rows, check_sizes, cropped, replace_item
from llorch_jax.cache.codecs.floats import dtype_of, from_stored, to_stored
from llorch_jax.cache.static import empty_slots
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete


@struct.dataclass
class RotatingCache(KVCache):
    """Keys and values of the newest tokens in a ring (the rolling buffer of Mistral 7B, Jiang et al. 2023, section 2).

    A query at position i looks at the positions after i - window up to i, and at the first `sinks` ones (attention
    sinks, Xiao et al. 2024, 2309.17453). Every token keeps its own position embedding: unlike StreamingLLM, this does
    not renumber tokens, so that a row ends at n_positions. Memory and the cost of a step depend on sinks + window only.

    Position p lies in slot p where p < sinks, else in slot sinks + (p - sinks) % window.

    Attributes:
        keys: L arrays [B, K, S, H], S = sinks + window.
        values: L arrays [B, K, S, H].
        lengths: int32 [B], tokens in each row.
        ends: int32 [B, L], one more than the highest position that each layer's ring has been given; what each slot
            holds follows from it. It is above `lengths` where tokens are not counted by `advance` yet, or were
            rolled back: those have overwritten older ones.
        window: newest tokens looked at, the query's own included.
        sinks: first tokens looked at beside them.
        limit: tokens that a row can ever hold, the model's n_positions.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    ends: jax.Array
    window: int = struct.field(pytree_node=False)
    sinks: int = struct.field(pytree_node=False)
    limit: int = struct.field(pytree_node=False)

    in_order: ClassVar[bool] = False

    @classmethod
    def init(
        cls, config: GPT2Config, *, batch_size: int = 1, window: int, sinks: int = 0, dtype: Any = "float32"
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            window: newest tokens kept, the current one included. One that reaches past `config.n_positions` keeps
                everything; no more than n_positions slots are allocated then.
            sinks: first tokens of a row kept beside them, less than `config.n_positions`.
            dtype: of keys and values as stored: float32, bfloat16 or float16. Attention computes in float32.

        Raises:
            CacheError: the batch size, window, sinks or dtype is impossible.
        """
        limit = config.n_positions
        check_sizes(config, batch_size, limit)
        if type(window) is not int or window < 1:
            raise CacheError(f"window: expected 1 or more tokens, got {window!r}")
        if type(sinks) is not int or not 0 <= sinks < limit:
            raise CacheError(f"sinks: expected 0 .. {limit - 1} tokens (n_positions={limit}), got {sinks!r}")
        window = min(window, limit - sinks)
        return cls(
            **empty_slots(config, batch_size, sinks + window, dtype),
            ends=jnp.zeros((batch_size, config.cache_layers), jnp.int32),
            window=window,
            sinks=sinks,
            limit=limit,
        )

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.limit

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values: float32, bfloat16 or float16."""
        return dtype_of(self.keys[0])

    @property
    def layout(self) -> tuple[int, int, int]:
        _, heads, _, head_dim = self.keys[0].shape
        return len(self.keys), heads, head_dim

    def update(self, layer: int, k: jax.Array, v: jax.Array, count: Any = None) -> Self:
        """As `KVCache.update`. Queries of more than one new token need the view that `append` returns.

        Raises:
            CacheError: layer or shapes do not fit, or this layer was given tokens that `advance` did not count and
                that have overwritten tokens which the row still needs.
            CapacityError: a row has no room for the tokens.
        """
        check_new_tokens(layer, k, v, self.batch_size, self.layout, count)
        self.check_room(k.shape[1] if count is None else count)
        self._check_intact(self.lengths, self.ends[:, layer : layer + 1])
        return self._write(layer, k, v, count)

    def append(self, layer: int, k: jax.Array, v: jax.Array, count: Any = None) -> tuple[Self, KVView]:
        """As `KVCache.append`. The view of more than one token is of the old ring and, behind it, the new tokens.

        The first of them still look at old tokens that the last of them overwrite.
        """
        with jax.named_scope("cache_update"):
            cache = self._write(layer, k, v, count)
        if k.shape[1] == 1:
            return cache, cache.read(layer)
        old = self.read(layer)
        steps = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        new = self.lengths[:, None] + steps
        if count is not None:
            new = jnp.where(steps < jnp.asarray(count, jnp.int32)[:, None], new, -1)
        positions = jnp.where(old.positions < self.lengths[:, None], old.positions, -1)
        return cache, old._replace(
            k=jnp.concatenate([old.k, k.astype(old.k.dtype).transpose(0, 2, 1, 3)], axis=2),
            v=jnp.concatenate([old.v, v.astype(old.v.dtype).transpose(0, 2, 1, 3)], axis=2),
            positions=jnp.concatenate([positions, new], axis=1),
        )

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        count = jnp.full_like(self.lengths, k.shape[1]) if count is None else jnp.asarray(count, jnp.int32)
        after = self.lengths + count
        if k.shape[1] == 1:
            turned = self.sinks + (self.lengths - self.sinks) % self.window
            slots = jnp.where(self.lengths < self.sinks, self.lengths, turned)
            write = partial(_write_token, slots=slots, count=count)
        else:
            write = partial(_write_block, steps=self._positions(after) - self.lengths[:, None])
        written = jnp.arange(len(self.keys))[None] == layer
        return self.replace(
            keys=replace_item(self.keys, layer, write(self.keys[layer], k)),
            values=replace_item(self.values, layer, write(self.values[layer], v)),
            ends=jnp.where(written, jnp.maximum(self.ends, after[:, None]), self.ends),
        )

    def _positions(self, ends: jax.Array) -> jax.Array:
        """The newest position before `ends` int32 [B] in each slot: int32 [B, S], -1 where there is none."""
        slot = jnp.arange(self.sinks + self.window, dtype=jnp.int32)[None]
        last = ends[:, None] - 1
        newest = last - (last - slot) % self.window  # congruent to the slot, as all positions in the ring are
        return jnp.where(
            slot < self.sinks, jnp.where(slot <= last, slot, -1), jnp.where(newest >= self.sinks, newest, -1)
        )

    def read(self, layer: int) -> KVView:
        """The ring as it is: of several tokens just written by `update`, what the last one may look at."""
        positions = self._positions(self.ends[:, layer])
        keys, values = from_stored(self.keys[layer]), from_stored(self.values[layer])
        return KVView(keys, values, positions, self.window, self.sinks)

    def reserve(self, count: Any) -> Self:
        self.check_room(count)
        self._check_intact(self.lengths, self.ends)
        return self

    def can_roll_back(self, count: Any) -> bool:
        """As `KVCache.can_roll_back`: not where the ring would overwrite tokens."""
        return bool(np.all(np.asarray(self.lengths) + np.asarray(count) <= self.sinks + self.window))

    def advance(self, count: Any) -> Self:
        self.check_room(count)
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def crop(self, length: Any) -> Self:
        """As `KVCache.crop`, as far as the ring still holds what the shorter row needs.

        That is so as long as a row never had more than sinks + window tokens; later only one token can be taken back,
        or all but at most `sinks`.

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
        """Raises CacheError where rings written up to `ends` [B, L'] lack tokens that rows of `lengths` [B] need.

        The next query, at position n, needs the first `sinks` positions and n - window + 1 .. n - 1; a ring written up
        to `end` has lost those from `sinks` on that are below end - window.
        """
        if not is_concrete(lengths, ends):
            return
        known, end = np.asarray(lengths), np.asarray(ends).max(axis=1)
        lost = (known < end - 1) & (known > self.sinks) & (end > self.sinks + self.window)
        if lost.any():
            row = int(np.argmax(lost))
            raise CacheError(
                f"cache: row {row} cannot go on from {known[row]} tokens: its ring (window={self.window}, "
                f"sinks={self.sinks}) was written up to token {end[row]}, over tokens that the next one looks at; "
                f"expected {end[row] - 1} tokens or more, or {self.sinks} or fewer"
            )

    def select(self, rows: Any) -> Self:
        index = check_rows(rows, self.batch_size)
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0), self)


def _heads_first(new: jax.Array, ring: jax.Array) -> jax.Array:
    """New tokens [B, T, K, H] as a ring stores them, [B, K, T, H]."""
    return to_stored(new, ring).transpose(0, 2, 1, 3)


@jax.jit  # compiled once for calls outside jit; inside, it is inlined
def _write_token(ring: jax.Array, new: jax.Array, slots: jax.Array, count: jax.Array) -> jax.Array:
    """The ring [B, K, S, H] with one token [B, 1, K, H] in `slots` int32 [B] of the rows whose count [B] is 1."""
    new = _heads_first(new, ring)

    def write(row: Any, ring: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(new, row, 1)
        start = (row, 0, slots[row], 0)
        # A static cache can take padding behind its end; here the slot holds a token that the row may still need.
        # The second condition always holds. Where XLA knows the first one too, and there is one row, it would drop the
        # `cond` and write twice, for attention and for the result, into copies of the ring.
        real = (count[row] > 0) & (slots[row] < ring.shape[2])
        return lax.cond(real, lambda: lax.dynamic_update_slice(ring, block, start), lambda: ring)

    return write(0, ring) if ring.shape[0] == 1 else lax.fori_loop(0, ring.shape[0], write, ring)


@jax.jit
def _write_block(ring: jax.Array, new: jax.Array, steps: jax.Array) -> jax.Array:
    """The ring [B, K, S, H] with those of T tokens [B, T, K, H] that `steps` int32 [B, S] names.

    Each slot takes the last token that falls to it; where the step is negative it keeps what it holds.
    """
    taken = jax.vmap(lambda tokens, steps: tokens.at[steps].get(mode="clip"))(new, steps)  # [B, S, K, H]
    return jnp.where(steps[:, None, :, None] >= 0, _heads_first(taken, ring), ring)
