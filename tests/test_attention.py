"""Attention in the forms that are fast, compared with NumPy's plain one."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax import attention
from llorch_jax.attention import DenseView, Queries


def plain(q, k, v, positions, slots, scale, window):
    """Softmax attention float64 [B, T, N, H], one query after the other."""
    out = np.zeros(q.shape)
    for row, step, head in np.ndindex(q.shape[:3]):
        keys = k[row, head * k.shape[1] // q.shape[2]]
        values = v[row, head * k.shape[1] // q.shape[2]]
        at = positions[row, step]
        seen = (slots[row] >= 0) & (slots[row] <= at) & (slots[row] > at - (window or 1000))
        scores = np.where(seen, keys @ q[row, step, head] * scale, -np.inf)
        weights = np.exp(scores - scores.max())
        out[row, step, head] = weights @ values / weights.sum()
    return out


@examples(12)
@given(st.data())
def test_attention_equals_numpy(data):
    batch, kv_heads, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    count = data.draw(st.sampled_from([1, 2, 5]))
    slots = count + data.draw(st.sampled_from([0, 3]))
    window = data.draw(st.sampled_from([None, 2]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    q = random.normal(size=(batch, count, kv_heads * groups, 4)).astype(np.float32)
    k, v = random.normal(size=(2, batch, kv_heads, slots, 4)).astype(np.float32)
    earlier = random.integers(0, slots - count + 1, (batch, 1))
    positions = (earlier + np.arange(count)).astype(np.int32)
    held = np.broadcast_to(np.arange(slots, dtype=np.int32), (batch, slots))
    view = DenseView(jnp.asarray(k), jnp.asarray(v), jnp.asarray(held))
    attend = jax.jit(attention.attend, static_argnums=3)  # one program per example
    got = attend(jnp.asarray(q), view, Queries(jnp.asarray(positions), window=window), 0.5)
    np.testing.assert_allclose(got, plain(q, k, v, positions, held, 0.5, window), atol=2e-6)


def test_blocks_of_queries_leave_out_later_slots(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    places = np.broadcast_to(np.arange(5, dtype=np.int32), (2, 5))
    view = DenseView(k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(places[:1]))
    got = attention.attend(q, view, Queries(jnp.asarray(places), start=0), 0.5)
    keys, values = np.asarray(view.k), np.asarray(view.v)
    np.testing.assert_allclose(got, plain(np.asarray(q), keys, values, places, places, 0.5, None), atol=2e-6)
