"""Attention of queries over the keys and values of a cache, in float32."""

import jax
import jax.numpy as jnp

from llorch_jax.cache.base import KVView

MASKED = jnp.finfo(jnp.float32).min
BLOCK = 128  # queries per block
EXACT = jax.lax.Precision.HIGHEST  # float32 products in full precision on every backend


def allowed_slots(positions: jax.Array, slot_positions: jax.Array, window: int | None) -> jax.Array:
    """Which slots a query may look at: filled, not after the query and, with a window, among the newest.

    Args:
        positions: of the queries, int32 [B, T].
        slot_positions: int32 [B, S] or [1, S], negative where a slot is empty.
        window: how many tokens back, the query's own included; None for all.

    Returns:
        bool [B, T, S].
    """
    query, slot = positions[:, :, None], slot_positions[:, None, :]
    allowed = (slot >= 0) & (slot <= query)
    return allowed if window is None else allowed & (slot > query - window)


def attention_scores(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    """Scaled dot products (Vaswani et al. 2017, section 3.2.1), before the mask.

    Args:
        q: [B, T, N, H].
        k: [B, K, S, H]; each key head serves N / K query heads.
        scale: factor.

    Returns:
        float32 [B, K, N / K, T, S].
    """
    batch, count, heads, head_dim = q.shape
    grouped = q.reshape(batch, count, k.shape[1], heads // k.shape[1], head_dim)
    return jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k.astype(jnp.float32), precision=EXACT) * scale


def attend(
    q: jax.Array,
    view: KVView,
    positions: jax.Array,
    scale: float,
    window: int | None = None,
    start: int | None = None,
) -> jax.Array:
    """Softmax attention of every query over the slots it may look at.

    Queries are taken in blocks, so that the scores in memory are [B, N, BLOCK, S] and not [B, N, T, S].

    Args:
        q: [B, T, N, H].
        view: keys and values of one layer.
        positions: of the queries, int32 [B, T].
        scale: of the scores.
        window: sliding window in tokens, or None.
        start: where slot s holds position s and all rows' first query has this position, the position: a block then
            skips the slots behind its last query.

    Returns:
        float32 [B, T, N, H].
    """
    count, slots = q.shape[1], view.k.shape[2]
    blocks = []
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        end = slots if start is None else min(start + last, slots)
        seen = KVView(view.k[:, :, :end], view.v[:, :, :end], view.positions[:, :end])
        blocks.append(_attend_block(q[:, first:last], seen, positions[:, first:last], scale, window))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _attend_block(q: jax.Array, view: KVView, positions: jax.Array, scale: float, window: int | None) -> jax.Array:
    scores = attention_scores(q, view.k, scale)
    allowed = allowed_slots(positions, view.positions, window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", weights, view.v.astype(jnp.float32), precision=EXACT)
    return out.reshape(q.shape)
