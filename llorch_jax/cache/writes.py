"""Writing tokens into arrays of slots, in place if these are donated: rows in order, and rings."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llorch_jax.kernels.writes import write


@partial(jax.jit, inline=True)  # compiled once for calls outside jit
def write_rows(buffer: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """Writes each row's new tokens into its slots from `starts` on.

    If fewer than T slots are left, the tokens that fit are written and the others, which must be padding, are dropped.

    Args:
        buffer: [B, K, S, X].
        new: [B, T, K, X], of the buffer's dtype.
        starts: int32 [B].
    """
    if buffer.shape[0] == 1:  # a single update, for which no kernel is faster
        return _write_rows(buffer, new, starts)
    return write(_row_places, _write_rows, buffer, new, starts)


def token_positions(new: jax.Array, starts: jax.Array) -> jax.Array:
    """int32 [B, T], the positions of new tokens [B, T, ...] from `starts` [B] on."""
    return starts[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None]


def own_rows(new: jax.Array) -> jax.Array:
    """int32 [B, T], the row of each of the new tokens [B, T, ...]."""
    return lax.broadcasted_iota(jnp.int32, new.shape[:2], 0)


def _row_places(new: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    return own_rows(new), token_positions(new, starts)


def _write_rows(buffer: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    new = new.transpose(0, 2, 1, 3)  # [B, K, T, X]
    if new.shape[2] > buffer.shape[2]:
        new = new[:, :, : buffer.shape[2]]

    def write(row: Any, filled: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(new, row, 1)
        start = starts[row]
        if new.shape[2] > 1:
            return _write_clipped(filled, block, row, start)
        # A full row gets only padding, which must not overwrite its last token. Without `cond`, XLA would not write
        # in place for one row and one head.
        fits = start < filled.shape[2]
        return lax.cond(fits, lambda: lax.dynamic_update_slice(filled, block, (row, 0, start, 0)), lambda: filled)

    return over_rows(write, buffer)


def _write_clipped(buffer: jax.Array, block: jax.Array, row: Any, start: jax.Array) -> jax.Array:
    """`dynamic_update_slice` of block [1, K, T, X] that drops what lies past the end instead of clamping the start."""
    _, heads, count, width = block.shape
    first = jnp.minimum(start, buffer.shape[2] - count)
    shift = start - first  # > 0 only where padding reaches past the end
    old = lax.dynamic_slice(buffer, (row, 0, first, 0), (1, heads, count, width))
    kept = jnp.arange(count)[None, None, :, None] < shift
    return lax.dynamic_update_slice(buffer, jnp.where(kept, old, jnp.roll(block, shift, axis=2)), (row, 0, first, 0))


def ring_slots(positions: jax.Array, window: int, sinks: int = 0) -> jax.Array:
    """The slot of each position: slot p for p < `sinks`, then a ring of `window` slots."""
    turned = sinks + (positions - sinks) % window
    return jnp.where(positions < sinks, positions, turned)


def ring_positions(ends: jax.Array, window: int, sinks: int = 0) -> jax.Array:
    """The newest position before `ends` int32 [B] in each slot of a ring: int32 [B, S], -1 if there is none."""
    slot = jnp.arange(sinks + window, dtype=jnp.int32)[None]
    last = ends[:, None] - 1
    newest = last - (last - slot) % window  # congruent to the slot, as all positions in the ring are
    first = jnp.where(slot <= last, slot, -1)
    return jnp.where(slot < sinks, first, jnp.where(newest >= sinks, newest, -1))


def write_ring(ring: jax.Array, new: jax.Array, starts: jax.Array, count: jax.Array, sinks: int = 0) -> jax.Array:
    """Writes `count` of each row's new tokens, whose first has position `starts`, into the slots of their positions.

    If several tokens go to the same slot, the last one remains. Padding is not written, as a ring has no spare slots.

    Args:
        ring: [B, K, S, X].
        new: [B, T, K, X], of the ring's dtype.
        starts: int32 [B].
        count: int32 [B].
        sinks: number of first slots that are not part of the ring.
    """
    return write(_ring_places(ring.shape[2] - sinks, sinks), _plain_write_ring(sinks), ring, new, starts, count)


@cache
def _ring_places(window: int, sinks: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def places(new: jax.Array, starts: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        real = jnp.arange(new.shape[1])[None] < count[:, None]
        return own_rows(new), jnp.where(real, ring_slots(token_positions(new, starts), window, sinks), -1)

    return places


@cache
def _plain_write_ring(sinks: int) -> Callable[..., jax.Array]:
    def write_ring(ring: jax.Array, new: jax.Array, starts: jax.Array, count: jax.Array) -> jax.Array:
        window = ring.shape[2] - sinks
        if new.shape[1] == 1:
            return _write_token(ring, new, ring_slots(starts, window, sinks), count)
        steps = ring_positions(starts + count, window, sinks) - starts[:, None]
        return _write_block(ring, new, steps)

    return write_ring


@jax.jit  # compiled once for calls outside jit; inside, it is inlined
def _write_token(ring: jax.Array, new: jax.Array, slots: jax.Array, count: jax.Array) -> jax.Array:
    """The ring [B, K, S, X] with one token [B, 1, K, X] written to slot `slots` [B] of the rows whose count is 1."""
    new = new.transpose(0, 2, 1, 3)

    def write(row: Any, ring: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(new, row, 1)
        start = (row, 0, slots[row], 0)
        # In a static cache padding lands after the end; here the slot holds a token that the row may still need.
        # The second condition always holds. If XLA knew the first one too, it would, for one row, drop the `cond` and
        # write twice, for attention and for the result, into copies of the ring.
        real = (count[row] > 0) & (slots[row] < ring.shape[2])
        return lax.cond(real, lambda: lax.dynamic_update_slice(ring, block, start), lambda: ring)

    return over_rows(write, ring)


@jax.jit
def _write_block(ring: jax.Array, new: jax.Array, steps: jax.Array) -> jax.Array:
    """The ring [B, K, S, X] with token steps[b, s] of the new tokens [B, T, K, X] in slot s of row b.

    A slot whose step, int32 [B, S], is negative is unchanged.
    """
    taken = jax.vmap(lambda tokens, steps: tokens.at[steps].get(mode="clip"))(new, steps)  # [B, S, K, X]
    return jnp.where(steps[:, None, :, None] >= 0, taken.transpose(0, 2, 1, 3), ring)


def over_rows(write: Any, buffer: jax.Array) -> jax.Array:
    """The buffer after `write(row, buffer)` for each of its rows, the first axis."""
    return write(0, buffer) if buffer.shape[0] == 1 else lax.fori_loop(0, buffer.shape[0], write, buffer)
