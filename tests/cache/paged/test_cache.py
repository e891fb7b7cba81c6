"""PagedCache: equal to a static cache, sharing pages until one row writes, never losing or leaking a page."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import (
    CONFIGS,
    POSITIONS,
    Chunk,
    append,
    append_owned,
    assert_close,
    batches,
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

from llorch_jax.cache.operations import convert
from llorch_jax.cache.paged.cache import PAGE_SIZE, PagedCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.decoding import loop as decoding
from llorch_jax.decoding import steps
from llorch_jax.errors import CacheError, CapacityError
from llorch_jax.model import forward

TINY = make_config(layers=2, heads=4, kv_heads=2, head_dim=5)  # grouped-query, odd head_dim
PLAIN, SHARING = CONFIGS[0], CONFIGS[5]
CASES = ((TINY, 3), (PLAIN, 16), (CONFIGS[2], 1), (SHARING, 7))  # every shape is compiled: few pairs, all kinds


def make_paged(config, batch_size=1, page_size=3, **settings) -> PagedCache:
    return PagedCache.init(config, batch_size=batch_size, page_size=page_size, **settings)


def filled(config, lengths, page_size=3, **settings) -> tuple[PagedCache, "np.ndarray"]:
    """A cache of random rows of these lengths, and their tokens [B, 24]."""
    batch = make_batch(lengths)
    cache = make_paged(config, len(lengths), page_size, **settings)
    return feed(config, cache, batch, in_chunks(lengths, 16))[1], batch.tokens


def named(cache) -> set[int]:
    """The pages that tables and copies to be made name."""
    return {int(page) for array in (cache.tables, cache.sources) for page in np.ravel(array) if page >= 0}


def assert_dense(config, logits, tokens) -> None:
    """Fails unless logits [V] are those that the uncached forward pass gives the last of tokens [T]."""
    padded = make_batch([len(tokens)])
    padded.tokens[0, : len(tokens)] = tokens
    assert_close(logits, uncached(config, padded)[0, len(tokens) - 1])


def pool_conversions(compiled: str, pool: jax.Array) -> list[str]:
    """The instructions of a compiled program that copy an array of the pool's shape or give it another dtype."""
    shape = ",".join(map(str, pool.shape))
    kind = {"float32": "f32", "float16": "f16", "uint16": "u16"}[pool.dtype.name]
    made = re.compile(rf"= (\w+)\[{shape}\]\S* ([\w-]+)\(")
    lines = [(made.search(line), line.strip()) for line in compiled.splitlines()]
    return [line for found, line in lines if found and (found[1] != kind or found[2] in ("copy", "copy-start"))]


class TestExact:
    @pytest.mark.parametrize(("config", "page_size"), CASES)
    @examples(5)
    @given(data=st.data())
    def test_any_split_of_ragged_rows_equals_the_uncached_pass(self, config, page_size, data):
        batch = data.draw(batches(sizes=(3,), longest=16))
        chunks = data.draw(splits(batch.lengths, widths=(1, 5)))
        logits, cache = feed(config, make_paged(config, batch.size, page_size), batch, chunks)
        assert_close(logits, uncached(config, batch))
        assert np.array_equal(cache.lengths, batch.lengths)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_storage_equals_a_static_cache_of_the_same(self, dtype):
        batch = make_batch([16, 7, 13])
        chunks = in_chunks(batch.lengths, 5)
        expected, _ = feed(TINY, StaticCache.init(TINY, batch_size=3, dtype=dtype), batch, chunks)
        logits, cache = feed(TINY, make_paged(TINY, 3, dtype=dtype), batch, chunks)
        assert_close(logits, expected)
        assert cache.dtype == cache.read(0).dense().k.dtype == jnp.dtype(dtype)

    def test_a_row_of_a_ragged_batch_equals_the_row_alone(self):
        batch = make_batch([16, 9, 1])
        logits, _ = feed(TINY, make_paged(TINY, 3), batch, in_chunks(batch.lengths, 5))
        for row in range(3):
            alone, _ = feed(TINY, make_paged(TINY), batch.row(row), in_chunks(batch.lengths[row : row + 1], 5))
            assert_close(logits[row : row + 1], alone)

    def test_jitted_equals_not_jitted_and_owned(self):
        config = make_config(layers=1, heads=2, kv_heads=1)
        batch = make_batch([6, 2, 5])
        chunks = [*in_chunks([5, 2, 4], 5), *in_chunks([1, 0, 1], 1)]
        plain, _ = feed(config, make_paged(config, 3), batch, chunks, step=append)
        for step in (jax.jit(append, static_argnames="config"), append_owned):
            assert_close(feed(config, make_paged(config, 3), batch, chunks, step=step)[0], plain)

    def test_prefill_pads_without_damage(self):
        batch = make_batch([23, 17, 3])
        chunks = [*in_chunks([5, 1, 2], 5), *in_chunks([18, 16, 1], 18)]
        logits, _ = feed_prefill(TINY, make_paged(TINY, 3), batch, chunks)
        assert_close(logits, uncached(TINY, batch)[np.arange(3), batch.lengths - 1])

    def test_forward_leaves_its_cache_valid(self):
        cache, tokens = filled(TINY, [4])
        logits, _ = forward(make_params(TINY), TINY, tokens[:, 4:9], cache)
        again, after = forward(make_params(TINY), TINY, tokens[:, 4:9], cache)
        assert np.array_equal(logits, again)
        assert (int(cache.lengths[0]), int(after.lengths[0])) == (4, 9)


class TestGeneration:
    @pytest.mark.parametrize(("config", "page_size"), [(TINY, 3)])
    def test_generate_and_stream_equal_a_static_cache(self, config, page_size):
        batch = make_batch([9, 2, 14])
        request = (make_params(config), config, batch.tokens[:, :14], 12)
        expected, _ = decoding.generate_tokens(*request, lengths=batch.lengths)
        tokens, cache = decoding.generate_tokens(
            *request, cache=make_paged(config, 3, page_size), lengths=batch.lengths
        )
        streamed = decoding.stream_tokens(*request, cache=make_paged(config, 3, page_size), lengths=batch.lengths)
        assert np.array_equal(tokens, expected)
        assert np.array_equal(np.stack(list(streamed), axis=1), expected)
        assert np.array_equal(cache.lengths, batch.lengths + 11)

    def test_finished_rows_stay_as_they_are(self):
        batch = make_batch([5, 8, 2])
        request = (make_params(TINY), TINY, batch.tokens[:, :8], 14)
        free, _ = decoding.generate_tokens(*request, lengths=batch.lengths)
        eos = int(free[0, 2])
        expected, static = decoding.generate_tokens(*request, lengths=batch.lengths, eos_id=eos)
        tokens, cache = decoding.generate_tokens(*request, cache=make_paged(TINY, 3), lengths=batch.lengths, eos_id=eos)
        assert np.array_equal(tokens, expected)
        assert np.array_equal(cache.lengths, static.lengths)

    def test_exactly_enough_pages_are_enough(self):
        shared, own = 2, 4  # of 3 tokens: positions 0 .. 5 and, per branch, 6 .. 16
        cache, tokens = filled(TINY, [7], num_pages=shared + 3 * own, capacity=24)
        prompt = np.repeat(tokens[:, 7:10], 3, axis=0)
        out, after = decoding.generate_tokens(make_params(TINY), TINY, prompt, 8, cache=cache.fork(3))
        assert after.page_stats().free == 0
        whole, _ = decoding.generate_tokens(make_params(TINY), TINY, np.repeat(tokens[:, :10], 3, axis=0), 8)
        assert np.array_equal(out, whole)

    def test_one_page_too_few_is_refused_before_anything_is_done(self):
        cache, tokens = filled(TINY, [7], num_pages=5, capacity=24)
        before = np.array(cache.keys[0])
        with pytest.raises(CapacityError, match=r"3 pages of 3 tokens are needed and 2 of 5 are free"):
            decoding.generate_tokens(make_params(TINY), TINY, tokens[:, 7:10], 8, cache=cache)
        assert np.array_equal(cache.keys[0], before)
        assert np.array_equal(cache.lengths, [7])
        assert len(named(cache)) == 3


class TestInPlace:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_compiled_steps_neither_copy_nor_convert_a_pool(self, batch_size, dtype):
        cache, params = make_paged(TINY, batch_size, dtype=dtype).reserve(16), make_params(TINY)
        count = jnp.ones(batch_size, jnp.int32)
        tokens = jnp.zeros((batch_size, 16), jnp.int32)
        for lowered in (
            steps.decode.lower(params, TINY, tokens[:, 0], cache),
            steps.prefill_step.lower(params, TINY, tokens, count, cache, fresh=True),
        ):
            assert pool_conversions(lowered.compile().as_text(), cache.keys[0]) == []

    def test_pools_stay_where_they_are_also_when_pages_are_copied(self):
        cache, tokens = filled(TINY, [7])
        cache = cache.fork(3)
        before = pointers(cache)
        for column in range(7, 10):
            _, cache = decoding.decode_step(make_params(TINY), TINY, np.repeat(tokens[0, column], 3), cache)
        assert pointers(cache) == before
        assert cache.page_stats().shared == 2


class TestFork:
    @examples(6)
    @given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=2), seed=st.integers(0, 99))
    def test_every_branch_goes_on_like_a_dense_row(self, lengths, seed):
        parent, tokens = filled(TINY, lengths)
        cache = parent.fork(2)
        assert pointers(cache) == pointers(parent)
        more = np.random.default_rng(seed).integers(0, 97, (4, 4), np.int32)
        logits, cache = forward(make_params(TINY), TINY, more, cache)
        for branch in range(4):
            row = branch // 2
            assert_dense(TINY, logits[branch, -1], [*tokens[row, : lengths[row]], *more[branch]])
        logits, _ = forward(make_params(TINY), TINY, more[:2], parent)  # still there, and unchanged
        for row in range(2):
            assert_dense(TINY, logits[row, -1], [*tokens[row, : lengths[row]], *more[row]])

    def test_only_the_last_page_is_copied_and_one_branch_keeps_it(self):
        cache, _ = filled(TINY, [8])
        cache = cache.fork(4)
        assert cache.page_stats().used == 3
        assert cache.room() == 0
        cache = cache.reserve(1)
        assert np.sum(np.asarray(cache.sources[0]) >= 0) == 3
        assert len(set(np.asarray(cache.tables)[:, 2])) == 4
        assert cache.page_stats().shared == 2
        assert cache.room() >= 1

    def test_a_full_last_page_is_not_copied(self):
        cache, _ = filled(TINY, [9])
        cache = cache.fork(2).reserve(1)
        assert np.all(np.asarray(cache.sources) < 0)
        assert cache.page_stats().shared == 3

    def test_a_branch_that_does_not_write_keeps_the_page(self):
        cache, _ = filled(TINY, [8])
        shared = int(cache.tables[0, 2])
        cache = cache.fork(2).reserve(jnp.asarray([1, 0], jnp.int32))
        assert np.asarray(cache.tables)[:, 2].tolist() != [shared, shared]
        assert int(cache.tables[1, 2]) == shared

    def test_of_branches_of_unequal_length_the_longest_keeps_the_page(self):
        cache, tokens = filled(TINY, [8])
        shared = int(cache.tables[0, 2])
        cache = cache.fork(2).crop(jnp.asarray([7, 8], jnp.int32)).reserve(1)
        assert int(cache.tables[1, 2]) == shared
        logits, _ = decoding.decode_step(make_params(TINY), TINY, np.asarray([5, 6]), cache)
        assert_dense(TINY, logits[0], [*tokens[0, :7], 5])
        assert_dense(TINY, logits[1], [*tokens[0, :8], 6])

    def test_layer_by_layer_updates_copy_in_every_layer(self):
        cache, _ = filled(TINY, [8])
        cache = cache.fork(2)
        before = [np.asarray(cache.read(layer).dense().k)[:, :, :8] for layer in range(2)]
        k = jnp.ones((2, 1, 2, 5), jnp.float32)
        for layer in range(2):
            cache = cache.update(layer, k * jnp.asarray([[[[1.0]]], [[[2.0]]]]), k)
        cache = cache.advance(1)
        for layer in range(2):
            after = np.asarray(cache.read(layer).dense().k)
            assert np.array_equal(after[:, :, :8], before[layer])
            assert after[:, 0, 8, 0].tolist() == [1, 2]

    def test_going_back_before_a_copy_was_made_shares_again(self):
        cache, tokens = filled(TINY, [8])
        reserved = cache.fork(2).reserve(1)
        assert np.array_equal(reserved.read(0).dense().k[:, :, :8], cache.fork(2).read(0).dense().k[:, :, :8])
        for back in (reserved.crop(8), reserved.select([0, 1])):
            assert named(back) == named(cache)
            logits, _ = forward(make_params(TINY), TINY, [[3], [4]], back)
            assert_dense(TINY, logits[1, 0], [*tokens[0, :8], 4])

    @pytest.mark.parametrize("branches", [0, -1, 2.0, True])
    def test_impossible_numbers(self, branches):
        with pytest.raises(CacheError, match="branches: expected a whole number from 1 up"):
            make_paged(TINY).fork(branches)


class TestReserve:
    def test_out_of_pages_leaves_everything_as_it_was(self):
        cache, _ = filled(TINY, [8], num_pages=4)
        cache = cache.fork(3)
        tables = np.array(cache.tables)
        for attempt in (cache.reserve, cache.check_room):
            with pytest.raises(
                CapacityError, match=r"2 pages of 3 tokens are needed and 1 of 4 are free; free or crop rows"
            ):
                attempt(1)
        with pytest.raises(CapacityError):
            cache.update(0, jnp.ones((3, 1, 2, 5), jnp.float32), jnp.ones((3, 1, 2, 5), jnp.float32))
        assert np.array_equal(cache.tables, tables)
        cache.select([0, 1]).reserve(1)

    def test_pages_reserved_without_need_are_given_to_rows_that_need_them(self):
        cache = make_paged(TINY, 2, num_pages=4).reserve(jnp.asarray([12, 0], jnp.int32))
        assert cache.page_stats().free == 0
        cache = cache.reserve(jnp.asarray([1, 9], jnp.int32))
        assert np.sum(np.asarray(cache.tables) >= 0, axis=1).tolist() == [1, 3]

    def test_all_rows_can_go_on_for_a_page_when_there_are_enough(self):
        cache = make_paged(TINY, 3, page_size=16)
        cache = cache.reserve(jnp.asarray([5, 9, 14], jnp.int32)).advance(jnp.asarray([5, 9, 14], jnp.int32))
        assert cache.room() == 2
        assert cache.reserve(1).room() == 2  # more would make the tables wider
        assert cache.reserve(3).room() >= 16

    def test_room_ends_at_the_capacity(self):
        cache = make_paged(TINY, page_size=7, capacity=10).reserve(9).advance(9)
        assert cache.reserve(1).room() == 1
        with pytest.raises(CapacityError, match="its capacity is 10"):
            cache.reserve(2)

    def test_the_tables_width_follows_the_longest_row(self):
        cache = make_paged(TINY, 2, page_size=4)
        widths = {cache.reserve(count).tables.shape[1] for count in range(1, POSITIONS + 1)}
        assert widths == {4, 6, 8, 12, 16}
        cache = cache.reserve(POSITIONS).advance(POSITIONS)
        assert cache.clear().reserve(1).tables.shape == (2, 4)

    def test_within_jit_it_does_nothing(self):
        cache = make_paged(TINY)
        assert np.array_equal(jax.jit(lambda cache: cache.reserve(5))(cache).tables, cache.tables)

    def test_a_second_time_changes_nothing(self):
        cache = filled(TINY, [8])[0].fork(2).reserve(2)
        assert cache.reserve(2) is cache


class TestCrop:
    @examples(8)
    @given(length=st.integers(0, 13), kept=st.integers(0, 13))
    def test_going_back_is_never_having_gone_on(self, length, kept):
        batch = make_batch([length, 12, 5])
        _, cache = feed(TINY, make_paged(TINY, 3), batch, in_chunks(batch.lengths, 16))
        cache = cache.crop(kept)
        lengths = np.minimum(batch.lengths, kept)
        assert cache.page_stats().used == sum(-(-lengths // 3))
        more = make_batch([3, 3, 3], seed=1).tokens[:, :3]
        logits, _ = forward(make_params(TINY), TINY, more, cache)
        for row in range(3):
            assert_dense(TINY, logits[row, -1], [*batch.tokens[row, : lengths[row]], *more[row]])

    def test_clear_frees_every_page(self):
        cache, _ = filled(TINY, [20, 3])
        assert cache.clear().page_stats().free == cache.num_pages
        assert np.array_equal(cache.clear().lengths, [0, 0])

    def test_free_rows_frees_what_no_other_row_shares(self):
        cache, _ = filled(TINY, [20, 9])
        cache = cache.select([0, 1, 1]).free([0, 2])
        assert cache.lengths.tolist() == [0, 9, 0]
        assert cache.page_stats().used == 3

    def test_in_jit_rows_keep_the_pages_for_what_follows(self):
        cache = filled(TINY, [8])[0].reserve(4)
        cache = jax.jit(lambda cache: cache.crop(8))(cache)
        assert cache.room() >= 4

    def test_pages_kept_in_jit_are_replaced_where_others_share_them(self):
        cache, tokens = filled(TINY, [8])
        cache = jax.jit(lambda cache: cache.crop(jnp.asarray([2, 8], jnp.int32)))(cache.fork(2))
        assert cache.room() == 0
        logits, cache = forward(make_params(TINY), TINY, [[1, 2, 3, 4]] * 2, cache)
        assert_dense(TINY, logits[0, -1], [*tokens[0, :2], 1, 2, 3, 4])
        assert_dense(TINY, logits[1, -1], [*tokens[0, :8], 1, 2, 3, 4])

    def test_in_jit_a_copy_that_is_still_to_be_made_is_not_forgotten(self):
        @jax.jit
        def write(cache, numbers):
            return write_all(cache.crop(jnp.asarray([5, 5], jnp.int32)), numbers, jnp.ones(2, jnp.int32))

        config = make_config(layers=2, heads=1, head_dim=2)
        cache = make_paged(config, 1, page_size=8, num_pages=4).reserve(5)
        cache = write_all(cache, jnp.arange(5.0)[None], jnp.asarray([5], jnp.int32))
        branches = write(cache.fork(2).reserve(1), jnp.asarray([[50.0], [60.0]]))
        keys = np.asarray(branches.read(1).dense().k)[:, 0, :6, 0] - 1000
        assert keys.tolist() == [[0, 1, 2, 3, 4, 50], [0, 1, 2, 3, 4, 60]]

    def test_a_negative_length(self):
        with pytest.raises(CacheError, match=r"crop: expected .* whole numbers of 0 or more"):
            make_paged(TINY).crop(-1)


class TestSelect:
    def test_rows_share_pages_and_dropped_ones_are_free(self):
        parent, _ = filled(TINY, [8, 20, 5])
        cache = parent.select([2, 2, 0])
        assert pointers(cache) == pointers(parent)
        assert cache.lengths.tolist() == [5, 5, 8]
        stats = cache.page_stats()
        assert (stats.used, stats.shared, stats.tokens) == (2 + 3, 2, 18)
        assert parent.page_stats().used == 3 + 7 + 2

    @pytest.mark.parametrize("rows", [[3], [-1], [], 0, [0.5]])
    def test_impossible_rows(self, rows):
        with pytest.raises(CacheError, match="rows: expected"):
            make_paged(TINY, 3).select(rows)


class TestAccounts:
    def test_stats_count_slots_once(self):
        cache = filled(TINY, [8, 4])[0]
        stats = cache.select([0, 0, 1]).page_stats()
        assert (stats.page_size, stats.total, stats.used, stats.free) == (3, 44, 5, 39)
        assert (stats.shared, stats.tokens, stats.wasted) == (3, 20, 5 * 3 - 12)

    def test_reserved_pages_are_used_and_wasted(self):
        stats = make_paged(TINY).reserve(3).page_stats()
        assert (stats.used, stats.wasted, stats.tokens) == (1, 3, 0)

    def test_memory_is_exact_and_known_without_allocating(self):
        cache = PagedCache.init(TINY, batch_size=2, capacity=20, page_size=8, dtype="bfloat16")
        pools = 2 * 2 * (2 * 3) * (2 * 8 * 5) * 2  # k and v, layers, pages, slots, bytes
        assert cache.memory_usage() == pools + 4 * (2 + 2 * 2 + 2)
        plan = jax.eval_shape(lambda: PagedCache.init(TINY, batch_size=2, capacity=20, page_size=8, dtype="bfloat16"))
        assert plan.memory_usage() == cache.memory_usage()

    def test_shared_layers_have_one_pool(self):
        assert len(make_paged(SHARING).keys) == 2
        assert make_paged(SHARING).dims == (2, 2, 9)


class TestLimits:
    def test_defaults(self):
        cache = PagedCache.init(TINY)
        assert (cache.batch_size, cache.capacity, cache.page_size) == (1, POSITIONS, PAGE_SIZE)
        assert cache.num_pages == POSITIONS // PAGE_SIZE
        assert PagedCache.init(TINY, capacity=5).page_size == 5

    @pytest.mark.parametrize(
        ("impossible", "message"),
        [
            ({"batch_size": 0}, "batch_size: expected a whole number from 1 up"),
            ({"capacity": 65}, "capacity: expected 1 .. n_positions=64, got 65"),
            ({"page_size": 0}, "page_size: expected a whole number in 1 .. 64, got 0"),
            ({"page_size": 11, "capacity": 10}, "page_size: expected a whole number in 1 .. 10, got 11"),
            ({"page_size": 2.0}, "page_size: expected a whole number"),
            ({"num_pages": 0}, "num_pages: expected a whole number in 1 .. 2147483647, got 0"),
            ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16"),
        ],
    )
    def test_impossible_settings(self, impossible, message):
        with pytest.raises((CacheError, CapacityError), match=message):
            PagedCache.init(TINY, **impossible)

    def test_misshapen_tokens(self):
        k = jnp.ones((1, 1, 2, 4), jnp.float32)
        with pytest.raises(CacheError, match=r"k: expected shape \[1, T, 2, 5\]"):
            make_paged(TINY).update(0, k, k)

    def test_advancing_over_what_was_not_written(self):
        with pytest.raises(CapacityError, match="row 0 has pages for 0 tokens, 0 of which are used"):
            make_paged(TINY).advance(1)
        cache = filled(TINY, [8])[0].fork(2).reserve(1)
        with pytest.raises(CacheError, match="advance: row 1 was not updated in layer 0"):
            cache.advance(1)


class Model:
    """The slow counterpart of a paged cache: rows as lists of numbers, and the pages that it must need."""

    def __init__(self, rows):
        self.rows = rows

    def shortage(self, cache: PagedCache, count) -> bool:
        """Whether there are too few pages, counted from sets."""
        size = cache.page_size
        holds = [set(np.asarray(cache.tables)[b, : -(-len(row) // size)].tolist()) for b, row in enumerate(self.rows)]
        needed = sum(
            -(-(len(row) + n) // size) - len(held) for row, n, held in zip(self.rows, count, holds, strict=True)
        )
        last = [int(cache.tables[b, len(row) // size]) if len(row) % size else None for b, row in enumerate(self.rows)]
        for page in set(last) - {None}:
            writers = sum(end == page and n > 0 for end, n in zip(last, count, strict=True))
            names = sum(page in held for held in holds)
            needed += writers if writers < names else writers - 1
        return needed > cache.num_pages - len(set().union(*holds))


def write_all(cache, numbers, count):
    """Appends numbers [B, T], as keys, and their negatives as values, in both layers."""
    k = jnp.broadcast_to(numbers[:, :, None, None], (*numbers.shape, 1, 2))
    for layer in range(2):
        cache, _ = cache.append(layer, k + 1000.0 * layer, -k, count)
    return cache.advance(count)


class TestSoak:
    def test_random_operations_equal_a_slow_model_and_leak_nothing(self):
        rng = np.random.default_rng(4)
        config = make_config(layers=2, heads=1, head_dim=2)
        shared, owned = jax.jit(write_all), jax.jit(write_all, donate_argnames="cache")
        cache = make_paged(config, 3, page_size=3, num_pages=12, capacity=24)
        model, parents, refused, number = Model([[], [], []]), [], 0, 0
        for _ in range(300):
            size = len(model.rows)
            kind = rng.choice(
                ["append", "append", "append", "crop", "select", "fork", "clear"],
                p=[0.26] * 3 + [0.07] * 2 + [0.05, 0.03],
            )
            if kind == "append":
                width = int(rng.choice([1, 5]))
                count = rng.integers(0, width + 1, size).astype(np.int32)
                numbers = number + np.arange(size * width, dtype=np.float32).reshape(size, width)
                number += size * width
                if max(len(row) + n for row, n in zip(model.rows, count, strict=True)) > cache.capacity:
                    continue
                if model.shortage(cache, count):
                    with pytest.raises(CapacityError, match="are free"):
                        cache.reserve(count)
                    refused += 1
                    continue
                if rng.random() < 0.5:
                    parents = []  # they have the pools that are donated
                    step = owned
                else:
                    parents = [*parents[-2:], (cache, model)]
                    step = shared
                cache = step(cache.reserve(count), jnp.asarray(numbers), jnp.asarray(count))
                model = Model([[*row, *new[:n]] for row, new, n in zip(model.rows, numbers, count, strict=True)])
            elif kind == "crop":
                length = rng.integers(0, 25, size).astype(np.int32)
                cache, model = cache.crop(length), Model([row[:n] for row, n in zip(model.rows, length, strict=True)])
            elif kind == "clear":
                cache, model = cache.clear(), Model([[] for _ in model.rows])
            else:
                rows = rng.integers(0, size, rng.choice([1, 3])) if kind == "select" or size > 1 else np.zeros(3, int)
                forked = kind == "fork" and size == 1
                cache, model = cache.fork(3) if forked else cache.select(rows), Model([model.rows[r] for r in rows])
            for one, expected in [(cache, model), *parents]:
                self.compare(one, expected)
        assert refused > 5
        assert cache.clear().page_stats().free == 12

    def compare(self, cache: PagedCache, model: Model) -> None:
        assert cache.lengths.tolist() == [len(row) for row in model.rows]
        assert np.all(np.asarray(cache.sources) < 0)
        for layer in range(2):
            k = np.asarray(cache.keys[layer])[cache.tables, 0, :, 1].reshape(cache.batch_size, -1)
            v = np.asarray(cache.values[layer])[cache.tables, 0, :, 0].reshape(cache.batch_size, -1)
            for row, numbers in enumerate(model.rows):
                assert (k[row, : len(numbers)] - 1000 * layer).tolist() == numbers
                assert (-v[row, : len(numbers)]).tolist() == numbers
        stats = cache.page_stats()
        assert stats.used == len(named(cache))
        assert stats.free == cache.num_pages - stats.used
        assert stats.tokens == sum(map(len, model.rows))


class TestWindow:
    """A model with a sliding window looks at no page before it, and the cache gives those back."""

    CONFIG = make_config(layers=1, heads=2, head_dim=10, sliding_window=6)

    def test_pages_outside_the_window_are_freed_and_logits_stay(self):
        batch = make_batch([24, 9])
        cache = make_paged(self.CONFIG, 2, page_size=4, num_pages=7)  # not enough for 24 and 9 tokens
        chunks = [*in_chunks([4, 4], 5), *in_chunks([20, 5], 1)]
        logits, cache = feed(self.CONFIG, cache, batch, chunks)
        assert_close(logits, uncached(self.CONFIG, batch))
        assert (np.asarray(cache.tables)[0] >= 0).nonzero()[0].min() == (23 - 6 + 1) // 4
        stats = cache.page_stats()
        assert stats.used <= 2 * (-(-6 // 4) + 2)
        assert stats.free == 7 - stats.used

    def test_what_needs_a_freed_page_is_refused_and_nothing_is_rolled_back_wrongly(self):
        batch = make_batch([20])
        _, cache = feed(self.CONFIG, make_paged(self.CONFIG, page_size=4), batch, in_chunks([20], 1))
        with pytest.raises(CacheError, match="row 0 cannot continue from 9 tokens: pages before token 12"):
            cache.crop(9)
        with pytest.raises(CacheError, match="row 0 cannot continue from 9 tokens"):
            jax.jit(lambda cache: cache.crop(9))(cache).reserve(1)
        logits, _ = feed(self.CONFIG, cache.crop(18), batch, in_chunks([2], 1), start=[18])
        assert_close(logits[:, 18:], uncached(self.CONFIG, batch)[:, 18:])
        with pytest.raises(CacheError, match="has dropped the one at position 0"):
            convert(cache, StaticCache.init(self.CONFIG))
        assert cache.clear().page_stats().used == 0

    def test_a_fork_keeps_the_pages_that_its_own_window_needs(self):
        batch = make_batch([16, 16])
        batch.tokens[1] = batch.tokens[0]
        _, cache = feed(self.CONFIG, make_paged(self.CONFIG, page_size=4), batch.row(0), in_chunks([8], 1))
        logits, _ = feed(self.CONFIG, cache.fork(2), batch, [Chunk(1, np.array([1, 0]))] * 8, start=[8, 8])
        assert_close(logits[:1, 8:], uncached(self.CONFIG, batch)[:1, 8:])
