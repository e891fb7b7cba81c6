"""DynamicCache: grows in buckets without losing a token, copies little, and is written in place between growths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import (
    CONFIGS,
    POSITIONS,
    VOCAB,
    append_owned,
    assert_close,
    batches,
    decode_copies,
    feed,
    feed_prefill,
    in_chunks,
    make_batch,
    make_config,
    make_params,
    pointers,
    splits,
    uncached,
)
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax.buckets import bucket
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding import loop as decoding
from llorch_jax.errors import CacheError, CapacityError
from llorch_jax.params import nbytes

SMALL = make_config(layers=1, heads=2, kv_heads=1, head_dim=5)
LONG = GPT2Config(vocab_size=VOCAB, n_positions=1024, n_embd=3, n_layer=1, n_head=1)


def filled(cache, seed=0):
    """The cache with a full bucket of random tokens in every row."""
    layers, heads, head_dim = cache.dims
    new = np.random.default_rng(seed).normal(size=(2, cache.batch_size, cache.slots, heads, head_dim))
    k, v = jnp.asarray(new, cache.dtype)
    for layer in range(layers):
        cache = cache.update(layer, k, v)
    return cache.advance(cache.slots)


def test_starts_small_and_has_the_limit_as_its_capacity():
    cache = DynamicCache.init(CONFIGS[0], batch_size=3)
    assert (cache.slots, cache.capacity, cache.batch_size, cache.room()) == (16, POSITIONS, 3, 16)
    assert cache.dims == StaticCache.init(CONFIGS[0]).dims
    assert DynamicCache.init(CONFIGS[0], capacity=7).slots == 7
    assert DynamicCache.init(CONFIGS[0], initial=17).slots == 24
    assert DynamicCache.init(CONFIGS[0], initial=999).slots == POSITIONS


@examples(15)
@given(st.data(), batches(sizes=(3,)))
def test_logits_do_not_depend_on_growth(data, batch):
    chunks = data.draw(splits(batch.lengths, widths=(1, 16)))
    logits, cache = feed(SMALL, DynamicCache.init(SMALL, batch_size=3), batch, chunks)
    assert_close(logits, uncached(SMALL, batch))
    assert cache.lengths.tolist() == batch.lengths.tolist()
    assert cache.slots in (16, 24)
    assert cache.slots == 16 or batch.lengths.max() > 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_growing_keeps_every_token_and_the_old_cache(dtype):
    cache = filled(DynamicCache.init(CONFIGS[3], batch_size=2, capacity=40, dtype=dtype))
    before = jax.tree.map(np.array, cache)
    for count, slots in ((1, 24), (np.array([0, 9]), 32), (17, 40), (24, 40)):
        grown = cache.reserve(count)
        assert (grown.slots, grown.dtype.name) == (slots, dtype)
        for new, old in zip(grown.keys + grown.values, before.keys + before.values, strict=True):
            assert np.array_equal(new[:, :, :16], old)
        assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.array, cache)))
    assert cache.reserve(0) is cache
    with pytest.raises(CapacityError, match=r"holds 16 tokens; adding 25 makes 41, but its capacity is 40"):
        cache.reserve(25)


def test_copies_less_than_three_times_the_final_size():
    cache, copied, sizes = DynamicCache.init(LONG, batch_size=2), 0, []
    while cache.lengths[0] < LONG.n_positions:
        grown = cache.reserve(1)
        if grown is not cache:
            copied += nbytes((cache.keys, cache.values))
            sizes.append(grown.slots)
        cache = grown.advance(grown.room())
    assert sizes == [24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert copied < 3 * nbytes((cache.keys, cache.values))


def test_attention_and_memory_follow_the_bucket():
    cache = DynamicCache.init(CONFIGS[0], batch_size=3)
    for count in (16, 17, 30, 64):
        grown = cache.reserve(count)
        view = grown.read(0).dense()
        assert view.k.shape[2] == view.v.shape[2] == view.positions.shape[1] == bucket(count)
        assert grown.memory_usage() == StaticCache.init(CONFIGS[0], batch_size=3, capacity=bucket(count)).memory_usage()


def test_crop_and_clear_keep_the_buffers():
    cache = DynamicCache.init(SMALL, batch_size=2).reserve(30).advance(20)
    for shorter in (cache.crop(3), cache.clear()):
        assert pointers(shorter) == pointers(cache)
        assert (shorter.slots, shorter.limit) == (32, POSITIONS)
    assert cache.crop([3, 40]).lengths.tolist() == [3, 20]


def test_compiles_once_per_bucket():
    params, prompt = make_params(SMALL), make_batch([5], seed=1).tokens[:, :5]
    expected, _ = decoding.generate_tokens(params, SMALL, prompt, 59, StaticCache.init(SMALL))
    before = decoding.compile_count()
    tokens, cache = decoding.generate_tokens(params, SMALL, prompt, 59, DynamicCache.init(SMALL))
    buckets = 5  # 16, 24, 32, 48, 64
    assert decoding.compile_count() - before <= 2 + buckets  # the prefill, the first choice, and a loop per bucket
    assert np.array_equal(tokens, expected)
    assert (cache.slots, cache.lengths.tolist()) == (64, [63])
    after = decoding.compile_count()
    decoding.generate_tokens(params, SMALL, prompt[:, :4], 50, DynamicCache.init(SMALL))
    assert decoding.compile_count() == after


@pytest.mark.parametrize("batch_size", [1, 3])
def test_decode_step_writes_in_place(batch_size):
    cache = DynamicCache.init(SMALL, batch_size=batch_size).reserve(20)
    assert decode_copies(SMALL, cache) == []
    where, token = pointers(cache), np.arange(batch_size)
    for _ in range(3):
        _, cache = decoding.decode_step(make_params(SMALL), SMALL, token, cache)
        assert pointers(cache) == where


def test_padding_wider_than_the_bucket_is_dropped():
    batch = make_batch([9, 2, 1])
    cache = DynamicCache.init(SMALL, batch_size=3, capacity=9)
    logits, cache = feed_prefill(SMALL, cache, batch, in_chunks(batch.lengths, 16))
    assert cache.slots == 9
    assert_close(logits, uncached(SMALL, batch)[np.arange(3), batch.lengths - 1])
    grown = DynamicCache.init(SMALL, batch_size=3)  # the second chunk, padded to 16, goes past the 16 slots
    logits, grown = feed(SMALL, grown, make_batch([15, 16, 3]), in_chunks([15, 16, 3], 5), step=append_owned)
    assert_close(logits, uncached(SMALL, make_batch([15, 16, 3])))


def test_update_outside_jit_grows():
    cache = filled(DynamicCache.init(SMALL, batch_size=2))
    k = jnp.ones((2, 3, *cache.dims[1:]))
    grown = cache.update(0, k, -k)
    assert grown.slots == 24
    assert np.all(grown.read(0).dense().v[:, :, 16:19] == -1)
    assert grown.advance(3).lengths.tolist() == [19, 19]


def test_misuse_is_refused():
    cache = DynamicCache.init(SMALL, capacity=20)
    with pytest.raises(CapacityError, match="adding 21 makes"):
        cache.check_room(21)
    with pytest.raises(CapacityError, match="capacity is 16"):  # nothing can have been written there
        cache.advance(17)
    with pytest.raises(CacheError, match="initial: expected a whole number from 1 up, got 0"):
        DynamicCache.init(SMALL, initial=0)
    with pytest.raises(CapacityError, match="n_positions=64, got 65"):
        DynamicCache.init(SMALL, capacity=65)
    with pytest.raises(CacheError, match="dtype"):
        DynamicCache.init(SMALL, dtype="int8")
