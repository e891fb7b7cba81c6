"""RotatingCache: equal to dense sliding-window attention with sinks, in bounded memory, written in place."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from cache_cases import (
    CONFIGS,
    POSITIONS,
    append_owned,
    assert_close,
    batches,
    buffers,
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
from flax import struct
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax.cache.rotating import RotatingCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.decoding import loop as decoding
from llorch_jax.errors import CacheError, CapacityError
from llorch_jax.model import forward

WINDOWED = make_config(heads=4, kv_heads=2, head_dim=5)  # grouped-query, odd head_dim
WIDTHS = (1, 9)
CASES = (  # config, window and sinks, shorter and longer than one append
    (WINDOWED, 5, 2),
    (WINDOWED, 5, 0),
    (CONFIGS[0], 16, 0),
    (CONFIGS[2], 1, 0),  # multi-query
    (CONFIGS[5], 7, 3),  # layers that share keys and values
    (CONFIGS[6], 4, 13),  # a model with a sliding window of its own
)


@struct.dataclass(kw_only=True)
class DenseCache(StaticCache):
    """The oracle: all tokens, with the mask of a window and sinks."""

    window: int = struct.field(pytree_node=False)
    sinks: int = struct.field(pytree_node=False)

    @classmethod
    def like(cls, ring: RotatingCache, config: Any) -> "DenseCache":
        full = StaticCache.init(config, batch_size=ring.batch_size, dtype=ring.dtype)
        return cls(full.keys, full.values, full.lengths, codec=full.codec, window=ring.window, sinks=ring.sinks)

    def read(self, layer: int) -> Any:
        return super().read(layer).replace(window=self.window, sinks=self.sinks)


def make_ring(config, window, sinks=0, batch_size=1, dtype="float32") -> RotatingCache:
    return RotatingCache.init(config, batch_size=batch_size, window=window, sinks=sinks, dtype=dtype)


def dense_logits(config, ring: RotatingCache, batch) -> np.ndarray:
    """What the oracle of the same window and sinks says."""
    return feed(config, DenseCache.like(ring, config), batch, in_chunks(batch.lengths, 24))[0]


def held(cache, layer: int = 0, row: int = 0) -> dict[int, np.ndarray]:
    """The key [K, H] of every position that a row's layer holds; no position may be in two slots."""
    view = cache.read(layer).dense()
    found = [(int(p), np.asarray(view.k)[row, :, slot]) for slot, p in enumerate(view.positions[row]) if p >= 0]
    assert len(dict(found)) == len(found), "positions: expected each in one slot"
    return dict(found)


def constant_tokens(cache, count: int, first: int) -> tuple[jax.Array, jax.Array]:
    """Keys [B, count, K, H] filled with each token's position + 1, and values with the negative of that."""
    _, heads, head_dim = cache.dims
    numbers = jnp.arange(first + 1, first + count + 1, dtype=jnp.float32)[None, :, None, None]
    k = jnp.broadcast_to(numbers, (cache.batch_size, count, heads, head_dim))
    return k, -k


def written(cache, *counts: int):
    """The cache with appends of so many constant tokens."""
    for count in counts:
        k, v = constant_tokens(cache, count, int(cache.lengths[0]))
        for layer in range(cache.dims[0]):
            cache = cache.update(layer, k, v)
        cache = cache.advance(count)
    return cache


@pytest.fixture(scope="module")
def reference_model(tmp_path_factory):
    about = references.sidecar("window")
    config, seed = about["parameters"]["config"], about["parameters"]["seed"]
    return references.load_synthesised(config, seed, about["weights_sha256"], tmp_path_factory.mktemp("window"))


class TestReference:
    @pytest.mark.parametrize(("name", "sinks"), [("window_logits", 0), ("sinks_logits", 4)])
    @pytest.mark.parametrize("split", ["whole", "single", "mixed"])
    def test_logits_are_the_references(self, reference_model, name, sinks, split):
        model = reference_model
        data, floor = references.arrays("window"), references.sidecar("window")["float32_floor"][name]
        tokens, total = data["tokens"], data["tokens"].shape[1]
        counts = {"whole": [total], "single": [1] * total, "mixed": [5, 1, 11, 1, 1, 5, 11, 5]}[split]
        cache = make_ring(model.config, 8, sinks, batch_size=2)
        logits, done = [], 0
        for count in counts:
            out, cache = forward(model.params, model.config, tokens[:, done : done + count], cache)
            logits.append(np.asarray(out))
            done += count
        assert done == total
        assert np.abs(np.concatenate(logits, axis=1) - data[name]).max() <= 3 * floor["max_abs_error"]


class TestExact:
    @given(st.data())
    @examples(25)
    def test_any_split_of_ragged_rows_equals_dense_attention(self, data):
        config, window, sinks = data.draw(st.sampled_from(CASES))
        batch = data.draw(batches(sizes=(3,)))
        ring = make_ring(config, window, sinks, 3)
        logits, ring = feed(config, ring, batch, data.draw(splits(batch.lengths, WIDTHS)))
        np.testing.assert_array_equal(ring.lengths, batch.lengths)
        assert_close(logits, dense_logits(config, ring, batch))
        if not sinks:
            assert_close(logits, uncached(dataclasses.replace(config, sliding_window=window), batch))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_storage_equals_a_dense_cache_of_the_same(self, dtype):
        batch = make_batch([23, 1, 12])
        ring = make_ring(WINDOWED, 5, 2, 3, dtype)
        chunks = [*in_chunks([8, 0, 3], 9), *in_chunks([8, 1, 6], 1), *in_chunks([7, 0, 3], 9)]
        logits, _ = feed(WINDOWED, ring, batch, chunks)
        # A sum in another order may round to the next number of the stored dtype.
        assert_close(logits, dense_logits(WINDOWED, ring, batch), 2 * float(jnp.finfo(dtype).eps))

    @pytest.mark.parametrize("sinks", [0, 2])
    def test_single_tokens_before_at_and_after_every_wrap(self, sinks):
        batch, ring = make_batch([24]), make_ring(WINDOWED, 5, sinks)
        logits, _ = feed(WINDOWED, ring, batch, in_chunks([24], 1))
        assert_close(logits, dense_logits(WINDOWED, ring, batch))
        everything, full = uncached(WINDOWED, batch), 5 + sinks
        assert_close(logits[:, :full], everything[:, :full])  # nothing is out of sight so far
        assert np.abs(logits - everything)[:, full:].max(axis=(0, 2)).min() > 1e-3

    @pytest.mark.parametrize("sinks", [0, 3])
    def test_a_window_over_the_whole_context_sees_everything(self, sinks):
        batch = make_batch([24, 7, 13])
        ring = make_ring(WINDOWED, 10 * POSITIONS, sinks, 3)
        assert ring.keys[0].shape[2] == POSITIONS
        assert_close(feed(WINDOWED, ring, batch, in_chunks([24, 7, 13], 9))[0], uncached(WINDOWED, batch))

    def test_a_row_of_a_ragged_batch_equals_the_row_alone(self):
        batch = make_batch([24, 1, 10])
        logits, _ = feed(WINDOWED, make_ring(WINDOWED, 5, 2, 3), batch, in_chunks(batch.lengths, 9))
        for row in range(3):
            alone = batch.row(row)
            single, _ = feed(WINDOWED, make_ring(WINDOWED, 5, 2), alone, in_chunks(alone.lengths, 9))
            assert_close(logits[row : row + 1], single)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_jitted_equals_not_jitted(self, batch_size):
        plain, compiled = (make_ring(WINDOWED, 5, 2, batch_size) for _ in range(2))
        jitted = jax.jit(lambda cache, *arguments: cache.append(1, *arguments), donate_argnums=0)
        for width, counts in [(9, [8, 0, 4]), (9, [2, 0, 9]), (1, [1, 1, 0]), (1, [1, 0, 1])]:
            count = jnp.asarray(counts[:batch_size], jnp.int32)
            k, v = constant_tokens(plain, width, int(plain.lengths[0]))
            plain, view = plain.append(1, k, v, count)
            compiled, compiled_view = jitted(compiled, k, v, count)
            for one, other in zip(
                jax.tree.leaves((plain, view)), jax.tree.leaves((compiled, compiled_view)), strict=True
            ):
                np.testing.assert_array_equal(one, other)
            plain, compiled = plain.advance(count), compiled.advance(count)

    def test_owned_equals_shared(self):
        batch = make_batch([9, 4, 7])
        chunks = [*in_chunks([8, 4, 2], 9), *in_chunks([1, 0, 4], 9), *in_chunks([0, 0, 1], 1)]
        shared, _ = feed(WINDOWED, make_ring(WINDOWED, 5, 2, 3), batch, chunks)
        owned, _ = feed(WINDOWED, make_ring(WINDOWED, 5, 2, 3), batch, chunks, step=append_owned)
        assert_close(owned, shared)

    def test_prefill_pads_without_damage(self):
        batch, ring = make_batch([20, 3, 9]), make_ring(WINDOWED, 5, 2, 3)
        expected = dense_logits(WINDOWED, ring, batch)[np.arange(3), batch.lengths - 1]
        logits, _ = feed_prefill(WINDOWED, ring, batch, in_chunks([12, 1, 3], 12) + in_chunks([8, 2, 6], 8))
        assert_close(logits, expected)


class TestGeneration:
    def test_greedy_text_is_that_of_a_sliding_window_model(self):
        params, sliding = make_params(WINDOWED), dataclasses.replace(WINDOWED, sliding_window=6)
        batch = make_batch([11, 2, 5], columns=11)
        ask = {"max_new_tokens": 30, "lengths": batch.lengths, "eos_id": 7}
        expected, _ = decoding.generate_tokens(params, sliding, batch.tokens, **ask)
        got, cache = decoding.generate_tokens(params, WINDOWED, batch.tokens, cache=make_ring(WINDOWED, 6, 0, 3), **ask)
        np.testing.assert_array_equal(got, expected)
        assert cache.keys[0].shape[2] == 6
        ring = make_ring(WINDOWED, 6, 0, 3)
        streamed = np.stack([*decoding.stream_tokens(params, WINDOWED, batch.tokens, cache=ring, **ask)], axis=1)
        np.testing.assert_array_equal(streamed, expected[:, : streamed.shape[1]])

    def test_finished_rows_stay_as_they_are(self):
        ring = written(make_ring(WINDOWED, 4, 1, 2), 9)
        before = [np.asarray(leaf) for leaf in buffers(ring)]
        k, v = constant_tokens(ring, 1, 50)
        ring = ring.update(0, k, v, jnp.asarray([0, 1], jnp.int32))
        for old, new in zip(before, buffers(ring), strict=True):
            np.testing.assert_array_equal(new[0], old[0])
        assert np.any(np.asarray(ring.keys[0])[1] != before[0][1])
        ring = ring.advance(jnp.asarray([0, 1], jnp.int32))
        assert sorted(held(ring, row=0)) == [0, 5, 6, 7, 8]


class TestInPlace:
    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_decode_step_copies_no_buffer(self, batch_size, dtype):
        config = make_config(heads=4, kv_heads=2, head_dim=16)
        assert decode_copies(config, make_ring(config, 24, 4, batch_size, dtype)) == []

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_no_buffer_is_copied_where_rows_may_be_finished(self, batch_size, dtype):
        ring, counts = make_ring(WINDOWED, 24, 4, batch_size, dtype), jnp.ones(batch_size, jnp.int32)
        compiled = append_owned.lower(make_params(WINDOWED), WINDOWED, counts[:, None], ring, counts).compile()
        shape = re.escape(f"[{','.join(map(str, ring.keys[0].shape))}]")
        assert re.search(shape, compiled.as_text())
        assert not re.search(rf"= \w+{shape}\S* copy(-start)?\(", compiled.as_text())

    def test_buffers_stay_where_they_are(self):
        params, cache = make_params(WINDOWED), make_ring(WINDOWED, 6, 2)
        before = pointers(cache)
        tokens = make_batch([11], columns=11).tokens
        _, cache = decoding.prefill(params, WINDOWED, tokens, cache)
        for _ in range(9):
            _, cache = decoding.decode_step(params, WINDOWED, np.zeros(1, np.int32), cache)
        _, cache = decoding.generate_tokens(params, WINDOWED, tokens, 8, cache=cache)
        assert pointers(cache) == before

    def test_memory_does_not_depend_on_the_context(self):
        for positions in (64, 4096):
            config = dataclasses.replace(WINDOWED, n_positions=positions)
            cache = jax.eval_shape(lambda config=config: make_ring(config, 8, 4, 3, "bfloat16"))
            heads, head_dim = WINDOWED.kv_heads, WINDOWED.head_dim
            assert cache.memory_usage() == 2 * 2 * 3 * heads * 12 * head_dim * 2 + 3 * 4 + 3 * 2 * 4
            assert cache.capacity == positions


class TestRead:
    @given(st.data())
    @examples(25)
    def test_it_holds_the_sinks_and_the_newest_tokens(self, data):
        window, sinks = data.draw(st.sampled_from([(5, 2), (1, 0), (4, 13)]))
        counts = data.draw(st.lists(st.sampled_from([1, 1, 9]), max_size=4))
        cache = written(make_ring(WINDOWED, window, sinks), *counts)
        length = sum(counts)
        for layer in range(2):
            tokens = held(cache, layer)
            expected = {p for p in range(length) if p < sinks or p >= length - window}
            assert set(tokens) == expected
            for position, key in tokens.items():
                np.testing.assert_array_equal(key, position + 1)

    def test_it_includes_tokens_not_counted_yet_in_their_layer_only(self):
        cache = written(make_ring(WINDOWED, 4, 1), 6)
        after = cache.update(0, *constant_tokens(cache, 1, 6))
        assert sorted(held(after, 0)) == [0, 3, 4, 5, 6]
        assert sorted(held(after, 1)) == [0, 2, 3, 4, 5]

    def test_the_view_of_a_block_has_what_its_queries_need(self):
        cache = written(make_ring(WINDOWED, 4, 1, 2), 6)
        k, v = constant_tokens(cache, 3, 6)
        _, view = cache.append(0, k, v, jnp.asarray([3, 1], jnp.int32))
        assert (view.window, view.sinks) == (4, 1)
        assert sorted(view.positions[0].tolist()) == [0, 2, 3, 4, 5, 6, 7, 8]
        assert sorted(view.positions[1].tolist()) == [-1, -1, 0, 2, 3, 4, 5, 6]
        np.testing.assert_array_equal(view.k[0, 0, :, 0], np.asarray(view.positions[0]) + 1.0)


class TestCrop:
    @given(st.data())
    @examples(20)
    def test_going_back_is_never_having_gone_on_or_an_error(self, data):
        window, sinks = 5, data.draw(st.sampled_from([0, 2]))
        batch = data.draw(batches(sizes=(3,), shortest=2))
        back = [data.draw(st.integers(0, int(n))) for n in batch.lengths]
        _, cache = feed(WINDOWED, make_ring(WINDOWED, window, sinks, 3), batch, in_chunks(batch.lengths, 9))
        exact = [m >= n - 1 or m <= sinks or n <= sinks + window for n, m in zip(batch.lengths, back, strict=True)]
        if not all(exact):
            with pytest.raises(CacheError, match=rf"row {exact.index(False)} cannot continue from"):
                cache.crop(jnp.asarray(back))
            return
        cache, left = cache.crop(jnp.asarray(back)), batch.lengths - np.asarray(back, np.int32)
        np.testing.assert_array_equal(cache.lengths, back)
        logits, _ = feed(WINDOWED, cache, batch, data.draw(splits(left, WIDTHS)), start=back)
        dense = dense_logits(WINDOWED, cache, batch)
        dense[np.arange(dense.shape[1])[None] < np.asarray(back)[:, None]] = np.nan
        assert_close(logits, dense)

    def test_one_token_back_once_and_no_further(self):
        cache = written(make_ring(WINDOWED, 4, 1), 9).crop(8)
        with pytest.raises(CacheError, match=r"from 7 tokens.*window=4, sinks=1.*up to token 9.*expected 8 tokens or"):
            cache.crop(7)
        assert sorted(held(written(cache, 1))) == [0, 5, 6, 7, 8]
        assert sorted(held(written(cache, 3))) == [0, 7, 8, 9, 10]
        _, view = cache.append(0, *constant_tokens(cache, 2, 8))
        assert sorted(view.positions[0].tolist()) == [-1, 0, 5, 6, 7, 8, 9]

    def test_rows_within_the_sinks_start_afresh(self):
        cache = written(written(make_ring(WINDOWED, 4, 2), 12).crop(1), 4)
        assert {p: key[0, 0] for p, key in held(cache).items()} == {p: p + 1 for p in range(5)}

    def test_clear_is_always_exact(self):
        cache, batch = written(make_ring(WINDOWED, 5, 2), 30).clear(), make_batch([10])
        assert held(cache) == {}
        logits, _ = feed(WINDOWED, cache, batch, in_chunks([10], 9))
        assert_close(logits, dense_logits(WINDOWED, cache, batch))

    def test_a_length_beyond_the_row_changes_nothing(self):
        cache = written(make_ring(WINDOWED, 4), 9)
        np.testing.assert_array_equal(cache.crop(40).ends, cache.ends)
        with pytest.raises(CacheError, match="whole numbers of 0 or more"):
            cache.crop(-1)

    def test_what_jit_could_not_refuse_is_refused_by_the_next_call(self):
        cache = jax.jit(lambda cache: cache.crop(5))(written(make_ring(WINDOWED, 4), 9))
        with pytest.raises(CacheError, match="row 0 cannot continue from 5 tokens"):
            decoding.decode_step(make_params(WINDOWED), WINDOWED, np.zeros(1, np.int32), cache)
        assert held(cache.clear()) == {}

    def test_tokens_written_but_not_counted_are_missed(self):
        cache = written(make_ring(WINDOWED, 4), 9)
        drafted = cache.update(0, *constant_tokens(cache, 3, 9))
        with pytest.raises(CacheError, match="row 0 cannot continue from 9 tokens"):
            drafted.update(0, *constant_tokens(cache, 1, 9))
        with pytest.raises(CacheError, match="row 0 cannot continue from 9 tokens"):
            drafted.reserve(1)
        drafted.update(1, *constant_tokens(cache, 3, 9)).advance(3).reserve(1)


class TestSelect:
    @given(st.data())
    @examples(8)
    def test_rows_go_on_as_the_rows_they_came_from(self, data):
        batch = data.draw(batches(sizes=(3,), shortest=2))
        rows = data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3))
        chunks = in_chunks(batch.lengths - 1, 9)
        _, cache = feed(WINDOWED, make_ring(WINDOWED, 5, 2, 3), batch, chunks)
        last = in_chunks(np.ones(3, np.int32), 1)
        expected, _ = feed(WINDOWED, cache, batch, last, start=batch.lengths - 1)
        taken = dataclasses.replace(batch, tokens=batch.tokens[rows], lengths=batch.lengths[rows])
        logits, after = feed(WINDOWED, cache.select(rows), taken, last, start=taken.lengths - 1)
        assert_close(logits, expected[rows])
        np.testing.assert_array_equal(after.lengths, taken.lengths)

    def test_other_numbers_of_rows(self):
        cache = written(make_ring(WINDOWED, 4, 1, 3), 9)
        assert cache.select([1]).batch_size == 1
        assert cache.select([0, 0, 2, 1]).ends.shape == (4, 2)
        with pytest.raises(CacheError, match=r"rows: expected row numbers 0 \.\. 2"):
            cache.select([3])


class TestLimits:
    def test_a_row_ends_at_the_last_position(self):
        cache = written(make_ring(WINDOWED, 4, batch_size=2), 60)
        assert (cache.capacity, cache.room()) == (POSITIONS, 4)
        assert cache.reserve(4) is cache
        with pytest.raises(CapacityError, match="row 0 holds 60 tokens; adding 5"):
            cache.reserve(5)
        with pytest.raises(CapacityError, match="row 1 holds 60 tokens; adding 5"):
            cache.update(0, *constant_tokens(cache, 5, 60), count=np.asarray([1, 5]))
        with pytest.raises(CapacityError, match="capacity is 64"):
            cache.advance(5)
        with pytest.raises(CapacityError):
            decoding.generate_tokens(make_params(WINDOWED), WINDOWED, [[1], [2]], 5, cache=cache)
        tokens, cache = decoding.generate_tokens(make_params(WINDOWED), WINDOWED, [[1], [2]], 4, cache=cache)
        assert tokens.shape == (2, 4)
        assert cache.room() == 0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"window": 0}, "window: expected a whole number from 1 up, got 0"),
            ({"window": -3}, "window: expected a whole number from 1 up, got -3"),
            ({"window": 2.5}, r"window: expected a whole number from 1 up, got 2\.5"),
            ({"window": True}, "window: expected a whole number from 1 up, got True"),
            ({"window": 4, "sinks": -1}, r"sinks: expected a whole number in 0 \.\. 63, got -1"),
            ({"window": 4, "sinks": POSITIONS}, r"sinks: expected a whole number in 0 \.\. 63, got 64"),
            ({"window": 4, "batch_size": 0}, "batch_size: expected a whole number from 1 up, got 0"),
            ({"window": 4, "dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16; got 'int8'"),
        ],
    )
    def test_impossible_settings(self, settings, message):
        with pytest.raises(CacheError, match=message):
            RotatingCache.init(WINDOWED, **settings)

    def test_misshapen_tokens(self):
        cache = make_ring(WINDOWED, 4)
        k, v = constant_tokens(cache, 2, 0)
        with pytest.raises(CacheError, match=r"layer: expected 0 \.\. 1, got 2"):
            cache.update(2, k, v)
        with pytest.raises(CacheError, match=r"k: expected shape \[1, T, 2, 5\]"):
            cache.update(0, k[:, :, :1], v)

    def test_shared_layers_have_one_ring(self):
        config = next(config for config in CONFIGS if config.kv_sharing)
        assert len(make_ring(config, 4).keys) == 2
