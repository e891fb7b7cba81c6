"""StaticCache by itself: what it writes where, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import llorch_jax as lj
from llorch_jax.cache.static import write_rows

CONFIG = lj.GPT2Config(vocab_size=97, n_positions=16, n_embd=12, n_layer=2, n_head=4, num_kv_heads=2)


def tokens_of(batch, count, start=0.0):
    """Keys and values [B, T, K, H] that are all different."""
    k = start + np.arange(batch * count * 2 * 3, dtype=np.float32).reshape(batch, count, 2, 3)
    return jnp.asarray(k), jnp.asarray(-k)


def test_update_writes_after_each_rows_end_and_advance_counts():
    cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=8)
    k, v = tokens_of(2, 3)
    cache = cache.update(0, k, v).update(1, v, k).advance(jnp.asarray([3, 1], jnp.int32))
    more_k, more_v = tokens_of(2, 2, start=100.0)
    after = cache.update(0, more_k, more_v).update(1, more_v, more_k).advance(2)
    np.testing.assert_array_equal(after.lengths, [5, 3])
    np.testing.assert_array_equal(after.read(0).dense().k[0, :, 3:5], more_k[0].swapaxes(0, 1))
    np.testing.assert_array_equal(after.read(0).dense().k[1, :, :1], k[1, :1].swapaxes(0, 1))
    np.testing.assert_array_equal(after.read(1).dense().v[1, :, 1:3], more_k[1].swapaxes(0, 1))
    np.testing.assert_array_equal(cache.lengths, [3, 1])  # the parent is as it was
    np.testing.assert_array_equal(cache.read(0).dense().k[0, :, 3:], 0)


def test_crop_clear_select():
    cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=8)
    k, v = tokens_of(2, 4)
    cache = cache.update(0, k, v).update(1, k, v).advance(jnp.asarray([4, 2], jnp.int32))
    np.testing.assert_array_equal(cache.crop(3).lengths, [3, 2])
    np.testing.assert_array_equal(cache.clear().lengths, [0, 0])
    chosen = cache.select([1, 1, 0])
    np.testing.assert_array_equal(chosen.lengths, [2, 2, 4])
    np.testing.assert_array_equal(chosen.values[1][2], cache.values[1][0])
    np.testing.assert_array_equal(cache.fork(2).lengths, [4, 4, 2, 2])


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), (jnp.float16, 2)])
def test_memory_usage_is_exact(dtype, itemsize):
    cache = lj.StaticCache.init(CONFIG, batch_size=3, capacity=8, dtype=dtype)
    assert cache.memory_usage() == 2 * 2 * 3 * 2 * 8 * 3 * itemsize + 3 * 4
    assert cache.memory_usage() == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert (cache.capacity, cache.batch_size, cache.dims) == (8, 3, (2, 2, 3))


@examples(25)
@given(st.data())
def test_write_rows_drops_what_lies_past_the_end(data):
    batch, count = 2, data.draw(st.sampled_from([1, 3, 5, 7]))
    starts = data.draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch))
    buffer = np.full((batch, 2, 5, 3), -7.0, np.float32)
    new, _ = tokens_of(batch, count)
    expected = buffer.copy()
    for row, start in enumerate(starts):
        for token in range(count):
            if start + token < 5:
                expected[row, :, start + token] = new[row, token]
    written = write_rows(jnp.asarray(buffer), new, jnp.asarray(starts, jnp.int32))
    np.testing.assert_array_equal(written, expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"batch_size": 0}, lj.CacheError, r"batch_size: expected a whole number from 1 up, got 0"),
            ({"capacity": 0}, lj.CapacityError, r"capacity: expected 1 \.\. n_positions=16, got 0"),
            ({"capacity": 17}, lj.CapacityError, r"capacity: expected 1 \.\. n_positions=16, got 17"),
            ({"dtype": "int8"}, lj.CacheError, r"dtype: expected one of float32, bfloat16, float16; got 'int8'"),
            ({"dtype": "nonsense"}, lj.CacheError, r"dtype: .* got 'nonsense'"),
        ],
    )
    def test_impossible_settings(self, settings, error, message):
        with pytest.raises(error, match=message):
            lj.StaticCache.init(CONFIG, **settings)

    def test_misshapen_tokens(self):
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=8)
        k, v = tokens_of(2, 3)
        with pytest.raises(lj.CacheError, match=r"layer: expected 0 \.\. 1, got 2"):
            cache.update(2, k, v)
        with pytest.raises(lj.CacheError, match=r"k: expected shape \[2, T, 2, 3\], got \[1, 3, 2, 3\]"):
            cache.update(0, k[:1], v)
        with pytest.raises(lj.CacheError, match=r"v: expected shape .* got \[2, 3, 3, 2\]"):
            cache.update(0, k, v.swapaxes(2, 3))
        with pytest.raises(lj.CacheError, match=r"v: expected as many tokens as k, 3, got 2"):
            cache.update(0, k, v[:, :2])

    def test_no_room(self):
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=4)
        k, v = tokens_of(2, 3)
        cache = cache.update(0, k, v).advance(jnp.asarray([3, 2], jnp.int32))
        with pytest.raises(lj.CapacityError, match=r"row 0 holds 3 tokens; adding 3 makes 6, but its capacity is 4"):
            cache.update(0, k, v)
        with pytest.raises(lj.CapacityError, match=r"row 1 holds 2 tokens; adding 3"):
            cache.advance(jnp.asarray([1, 3], jnp.int32))

    def test_rows_and_lengths(self):
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=4)
        for rows in ([2], [-1], [], [[0]], [0.5]):
            with pytest.raises(lj.CacheError, match="rows: expected"):
                cache.select(rows)
        with pytest.raises(lj.CacheError, match="crop: expected 1 or 2 whole numbers of 0 or more, got -1"):
            cache.crop(-1)
