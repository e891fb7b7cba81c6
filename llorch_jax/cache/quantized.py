"""QuantizedCache: keys and values as 8 or 4 bit integers, the newest tokens beside them in float32."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from llorch_jax.attention import KVView
from llorch_jax.cache.base import KVCache, check_rows, check_sizes, cropped, replace_item
from llorch_jax.cache.static import write_rows
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError

RESIDUAL = 32  # tokens kept in float32 unless told otherwise


class Quantized(NamedTuple):
    """Vectors [..., H] as integers, with one scale per vector.

    Attributes:
        codes: int8 [..., H] at 8 bits; uint8 [..., ceil(H / 2)] at 4 bits, element i in the low nibble of byte i and
            element i + ceil(H / 2) in its high nibble.
        scale: float32 [..., 1], the difference between neighbouring codes; 0 where all elements are equal.
        zero: float32 [..., 1], what code 0 stands for; None at 8 bits, where it is 0.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


class Recent(NamedTuple):
    """The newest tokens of one layer in float32, in a ring: position p in slot p % R.

    A slot is read only for the position that it is marked with, so nothing overwritten is read after `crop`.

    Attributes:
        keys: float32 [B, K, R, H].
        values: float32 [B, K, R, H].
        positions: int32 [B, R], of the token in each slot; -1 where it is empty.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array


@struct.dataclass
class QuantizedCache(KVCache):
    """Keys and values rounded to integers; slot s of a row holds the token at position s.

    Every vector of one token and head has its own scale. At 8 bits the codes are symmetric, -127 .. 127 times
    absmax / 127; at 4 bits asymmetric, the minimum plus 0 .. 15 times range / 15, which diverges from float32 a quarter
    less than symmetric codes. An element is at most half a scale off. The newest `residual` tokens of each row are
    kept in float32 too, in a ring, and read from there (KIVI, Liu et al. 2024, 2402.02750). KIVI scales keys per
    channel over groups of tokens, which is more exact but ties writing to group borders; here every token is written
    at once, and never again.

    The queries of one append see its own tokens exactly, so a whole prompt in an empty cache is exact: only what is
    appended later sees rounded values. How a row is split into appends does not change what is stored for given keys
    and values, but those of the deeper layers follow from what the queries saw. As long as no row is longer than
    `residual` tokens, results are those of `StaticCache`.

    After `crop` the tokens that the ring no longer holds are read from the integers.

    Attributes:
        keys: L times codes and scales of [B, K, S, H].
        values: L times codes and scales of [B, K, S, H].
        recent: L times the `residual` newest tokens; empty where `residual` is 0.
        lengths: int32 [B], tokens in each row.
        head_dim: width H of keys and values.
    """

    keys: tuple[Quantized, ...]
    values: tuple[Quantized, ...]
    recent: tuple[Recent, ...]
    lengths: jax.Array
    head_dim: int = struct.field(pytree_node=False)

    @classmethod
    def init(
        cls,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        bits: int = 8,
        residual: int | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            capacity: slots per row S, at most `config.n_positions`, which is the default.
            bits: per element of keys and values, 8 or 4.
            residual: how many of the newest tokens are kept in float32, 0 .. capacity; 32 by default, or the capacity
                where that is less.

        Raises:
            CacheError: the batch size, bits or residual are impossible.
            CapacityError: the capacity is not in 1 .. n_positions.
        """
        capacity = config.n_positions if capacity is None else capacity
        check_sizes(config, batch_size, capacity)
        residual = min(RESIDUAL, capacity) if residual is None else residual
        _check_settings(bits, residual, capacity)
        shape, layers = (batch_size, config.kv_heads, capacity, config.head_dim), range(config.cache_layers)
        return cls(
            keys=tuple(_empty(shape, bits) for _ in layers),
            values=tuple(_empty(shape, bits) for _ in layers),
            recent=tuple(_empty_recent(shape, residual) for _ in layers if residual),
            lengths=jnp.zeros(batch_size, jnp.int32),
            head_dim=config.head_dim,
        )

    @property
    def batch_size(self) -> int:
        return self.keys[0].codes.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].codes.shape[2]

    @property
    def layout(self) -> tuple[int, int, int]:
        return len(self.keys), self.keys[0].codes.shape[1], self.head_dim

    @property
    def bits(self) -> int:
        """Bits per element of keys and values."""
        return 8 if self.keys[0].zero is None else 4

    @property
    def residual(self) -> int:
        """How many of the newest tokens of a row are kept in float32."""
        return self.recent[0].positions.shape[1] if self.recent else 0

    def append(self, layer: int, k: jax.Array, v: jax.Array, count: Any = None) -> tuple[Self, KVView]:
        """`update` without checks, and what the queries of these T tokens may look at.

        They see the `residual` newest tokens, these included, and all of these tokens exactly, and rounded what is
        older. The codes are written before they are read: XLA would copy the buffers otherwise.
        """
        with jax.named_scope("cache_update"):
            cache = self._write(layer, k, v, count)
        view = cache.read(layer)
        if k.shape[1] > self.residual:  # else the ring holds them
            count = _counts(self.lengths, k, count)
            seen_k, seen_v = (_put_rows(x, new, self.lengths, count) for x, new in ((view.k, k), (view.v, v)))
            view = view._replace(k=seen_k, v=seen_v)
        return cache, view

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        starts, count = self.lengths, _counts(self.lengths, k, count)
        cache = self.replace(
            keys=replace_item(self.keys, layer, _write_codes(self.keys[layer], k, starts, count)),
            values=replace_item(self.values, layer, _write_codes(self.values[layer], v, starts, count)),
        )
        if not self.recent:
            return cache
        recent = _write_recent(self.recent[layer], k, v, starts, count)
        return cache.replace(recent=replace_item(self.recent, layer, recent))

    def read(self, layer: int) -> KVView:
        """Everything that one layer holds, tokens just written by `update` included, in float32.

        The newest `residual` tokens are exact.
        """
        keys, values = (dequantize(kind[layer], self.head_dim) for kind in (self.keys, self.values))
        if self.recent:
            ring = self.recent[layer]
            keys, values = _overlay(keys, ring.keys, ring), _overlay(values, ring.values, ring)
        return KVView(keys, values, jnp.arange(self.capacity, dtype=jnp.int32)[None])

    def advance(self, count: Any) -> Self:
        self.check_room(count)
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def crop(self, length: Any) -> Self:
        return self.replace(lengths=cropped(self.lengths, length))

    def select(self, rows: Any) -> Self:
        index = check_rows(rows, self.batch_size)
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0), self)


def quantize(x: jax.Array, bits: int) -> Quantized:
    """Vectors [..., H] of any float dtype, with one scale each, at 8 bits (symmetric) or 4 bits (asymmetric).

    An element is at most half a scale off. Elements must be finite and less than half of float32's largest.
    """
    x = x.astype(jnp.float32)
    if bits == 8:
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return Quantized(_rounded(x, scale, -127, 127).astype(jnp.int8), scale, None)
    zero = jnp.min(x, axis=-1, keepdims=True)
    scale = (jnp.max(x, axis=-1, keepdims=True) - zero) / 15
    codes = _rounded(x - zero, scale, 0, 15).astype(jnp.uint8)
    codes = jnp.pad(codes, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
    low, high = jnp.split(codes, 2, axis=-1)
    return Quantized(low | (high << 4), scale, zero)


def dequantize(stored: Quantized, head_dim: int) -> jax.Array:
    """float32 [..., H] of quantized vectors; `head_dim` H is needed where it is odd."""
    if stored.zero is None:
        return stored.codes.astype(jnp.float32) * stored.scale
    codes = jnp.concatenate([stored.codes & 15, stored.codes >> 4], axis=-1)[..., :head_dim]
    return codes.astype(jnp.float32) * stored.scale + stored.zero


def _rounded(x: jax.Array, scale: jax.Array, low: int, high: int) -> jax.Array:
    return jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1)), low, high)


def _check_settings(bits: Any, residual: Any, capacity: int) -> None:
    if type(bits) is not int or bits not in (4, 8):
        raise CacheError(f"bits: expected 8 or 4, got {bits!r}")
    if type(residual) is not int or not 0 <= residual <= capacity:
        raise CacheError(f"residual: expected 0 .. capacity={capacity} tokens, got {residual!r}")


def _empty(shape: tuple[int, ...], bits: int) -> Quantized:
    *leading, head_dim = shape
    scales = (*leading, 1)
    if bits == 8:
        return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros(scales, jnp.float32), None)
    codes = jnp.zeros((*leading, (head_dim + 1) // 2), jnp.uint8)
    return Quantized(codes, jnp.zeros(scales, jnp.float32), jnp.zeros(scales, jnp.float32))


def _empty_recent(shape: tuple[int, ...], residual: int) -> Recent:
    batch, heads, _, head_dim = shape
    ring = (batch, heads, residual, head_dim)
    return Recent(
        jnp.zeros(ring, jnp.float32), jnp.zeros(ring, jnp.float32), jnp.full((batch, residual), -1, jnp.int32)
    )


def _counts(lengths: jax.Array, k: jax.Array, count: Any) -> jax.Array:
    """How many of each row's tokens k [B, T, K, H] are real, int32 [B]."""
    return jnp.broadcast_to(jnp.asarray(k.shape[1] if count is None else count, jnp.int32), lengths.shape)


def _write_codes(stored: Quantized, new: jax.Array, starts: jax.Array, count: jax.Array) -> Quantized:
    """Quantizes `count` int32 [B] of the new tokens [B, T, K, H] into each row's slots from `starts` int32 [B] on."""
    written = quantize(new, 8 if stored.zero is None else 4)
    return jax.tree.map(lambda buffer, codes: _put_rows(buffer, codes, starts, count), stored, written)


def _put_rows(buffer: jax.Array, new: jax.Array, starts: jax.Array, count: jax.Array) -> jax.Array:
    """Writes `count` int32 [B] of the new tokens [B, T, K, H] into each row's slots from `starts` int32 [B] on."""
    if new.shape[1] > 1:
        return write_rows(buffer, new, starts)
    return _write_token(buffer, new.transpose(0, 2, 1, 3), starts, count > 0)


def _write_token(buffer: jax.Array, token: jax.Array, slots: jax.Array, real: jax.Array) -> jax.Array:
    """Writes one token [B, K, 1, H] into a slot of each row of [B, K, S, H], none where `real` bool [B] is false."""

    def write(row: Any, filled: jax.Array) -> jax.Array:
        start, size = (row, 0, slots[row], 0), (1, filled.shape[1], 1, filled.shape[3])
        old = lax.dynamic_slice(filled, start, size)
        new = lax.dynamic_slice_in_dim(token, row, 1)
        return lax.dynamic_update_slice(filled, jnp.where(real[row], new, old), start)

    if buffer.shape[0] == 1:
        return write(0, buffer)
    return lax.fori_loop(0, buffer.shape[0], write, buffer)


def _write_recent(recent: Recent, k: jax.Array, v: jax.Array, starts: jax.Array, count: jax.Array) -> Recent:
    """The ring after `count` of the tokens k and v [B, T, K, H], whose first has position `starts` int32 [B]."""
    slots = jnp.arange(recent.positions.shape[1], dtype=jnp.int32)[None]
    last = (starts + count)[:, None] - 1
    newest = last - (last - slots) % slots.shape[1]  # [B, R], the last position so far that belongs into the slot
    index = newest - starts[:, None]  # of the new token, negative where the slot stays: padding must not reach it
    return Recent(
        _write_ring(recent.keys, k, index),
        _write_ring(recent.values, v, index),
        jnp.where(index >= 0, newest, recent.positions),
    )


def _write_ring(ring: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """Puts token index[b, r] of `new` [B, T, K, H] into slot r of `ring` [B, K, R, H], nothing where it is negative."""
    new = new.astype(ring.dtype).transpose(0, 2, 1, 3)  # [B, K, T, H]
    if new.shape[2] == 1:  # then it goes into the only slot whose index is not negative, if any
        return _write_token(ring, new, jnp.argmax(index, axis=1), jnp.max(index, axis=1) >= 0)
    chosen = jnp.take_along_axis(new, jnp.maximum(index, 0)[:, None, :, None], axis=2)  # [B, K, R, H]
    return jnp.where(index[:, None, :, None] >= 0, chosen, ring)


def _overlay(x: jax.Array, newest: jax.Array, recent: Recent) -> jax.Array:
    """x [B, K, S, H] with the tokens `newest` [B, K, R, H] of a ring in their places."""
    slots, residual = x.shape[2], newest.shape[2]
    repeats = -(-slots // residual)
    exact = jnp.tile(recent.positions, (1, repeats))[:, :slots] == jnp.arange(slots, dtype=jnp.int32)[None]
    return jnp.where(exact[:, None, :, None], jnp.tile(newest, (1, 1, repeats, 1))[:, :, :slots], x)
