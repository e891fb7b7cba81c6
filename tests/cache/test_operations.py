"""fork, concat, split and convert: contents, sharing, and what is refused. Continuations: see test_properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import CONFIGS, assert_close, feed, in_chunks, make_batch, make_config, make_params, uncached

import llorch_jax as lj
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.layouts import make_cache
from llorch_jax.cache.operations import concat, convert, fork, split
from llorch_jax.cache.quantized import QuantizedCache
from llorch_jax.cache.rotating import RotatingCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.errors import CacheError, CapacityError, LlorchError

CONFIG = make_config(layers=2, heads=2, kv_heads=1, head_dim=5)
BATCH = make_batch([20, 3, 9])
LAYOUTS = ("static", "dynamic", "paged:8", "rotating:28+3")


@pytest.fixture(scope="module")
def static():
    """A static cache that holds the tokens of BATCH."""
    return feed(CONFIG, StaticCache.init(CONFIG, batch_size=3, capacity=32), BATCH, in_chunks(BATCH.lengths, 16))[1]


def contents(cache):
    """Keys and values [2, K, n, H] by position, for each row and layer, as float32."""
    rows = []
    for row, length in enumerate(np.asarray(cache.lengths)):
        for layer in range(cache.dims[0]):
            view = cache.read(layer).dense()
            positions = np.broadcast_to(view.positions, (cache.batch_size, view.k.shape[2]))[row]
            slots = [int(np.flatnonzero(positions == position)[0]) for position in range(length)]
            rows.append(np.stack([np.asarray(each[row], np.float32)[:, slots] for each in (view.k, view.v)]))
    return rows


def assert_equal_contents(got, expected):
    assert np.array_equal(got.lengths, expected.lengths)
    for one, other in zip(contents(got), contents(expected), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_can_be_converted_to_every_other_and_back(static, layout):
    before = jax.tree.map(np.array, static)
    cache = convert(static, make_cache(CONFIG, layout, batch_size=3))
    for target in LAYOUTS:
        other = convert(cache, make_cache(CONFIG, target, batch_size=3))
        assert type(other) is type(make_cache(CONFIG, target))
        assert_equal_contents(other, static)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.array, static)))


def test_conversion_changes_capacity_and_dtype(static):
    assert_equal_contents(convert(static, StaticCache.init(CONFIG, batch_size=3, capacity=20)), static)
    half = convert(static, DynamicCache.init(CONFIG, batch_size=3, dtype="bfloat16"))
    assert (half.dtype, half.slots) == (jnp.bfloat16, 24)
    for got, expected in zip(contents(half), contents(static), strict=True):
        assert np.array_equal(got, expected.astype(jnp.bfloat16).astype(np.float32))
    with pytest.raises(CapacityError, match=r"row 0 .* capacity is 19"):
        convert(static, StaticCache.init(CONFIG, batch_size=3, capacity=19))


def test_rounded_values_come_back_from_a_quantized_cache(static):
    rounded = convert(static, QuantizedCache.init(CONFIG, batch_size=3, residual=0))
    assert_equal_contents(convert(rounded, StaticCache.init(CONFIG, batch_size=3)), rounded)
    for got, expected in zip(contents(rounded), contents(static), strict=True):
        assert 0 < np.abs(got - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(("window", "sinks"), [(4, 0), (4, 2), (7, 3)])
def test_a_window_drops_old_tokens_and_goes_on_like_a_ring_of_its_own(static, window, sinks):
    """With one layer, keys and values do not depend on what earlier queries have seen."""
    config = make_config(layers=1, heads=2, head_dim=3)
    longer = make_batch(BATCH.lengths + 3)
    full, ring = (
        StaticCache.init(config, batch_size=3),
        RotatingCache.init(config, batch_size=3, window=window, sinks=sinks),
    )
    _, full = feed(config, full, longer, in_chunks(BATCH.lengths, 16))
    _, native = feed(config, ring, longer, in_chunks(BATCH.lengths, 16))
    rest = in_chunks([3, 3, 3], 1)
    expected, _ = feed(config, native, longer, rest, start=BATCH.lengths)
    logits, converted = feed(config, convert(full, ring), longer, rest, start=BATCH.lengths)
    assert_close(logits, expected)
    narrower = RotatingCache.init(config, batch_size=3, window=window - 1, sinks=sinks)
    assert convert(converted, narrower).lengths.tolist() == converted.lengths.tolist()


def test_what_a_window_has_dropped_cannot_be_converted(static):
    ring = convert(static, RotatingCache.init(CONFIG, batch_size=3, window=8, sinks=1))
    for target in ("static", "dynamic", "paged:8", "rotating:9+1", "rotating:8+2", "int8"):
        with pytest.raises(CacheError, match=r"RotatingCache .* row 0 of 20 tokens has dropped the one at position"):
            convert(ring, make_cache(CONFIG, target, batch_size=3))
    short = ring.select([1])  # 3 tokens, all there
    assert_equal_contents(convert(short, StaticCache.init(CONFIG)), static.select([1]))


def test_empty_rows_and_empty_caches_are_converted(static):
    empty = convert(static.clear(), DynamicCache.init(CONFIG, batch_size=3))
    assert (empty.lengths.tolist(), empty.slots) == ([0, 0, 0], 16)
    some = static.crop([0, 3, 0])
    assert_equal_contents(convert(some, make_cache(CONFIG, "paged:8", batch_size=3)), some)


def test_impossible_targets_are_refused(static):
    with pytest.raises(CacheError, match=r"target: expected batch_size 3 as in the cache, got 2"):
        convert(static, StaticCache.init(CONFIG, batch_size=2))
    with pytest.raises(CacheError, match=r"layers, kv heads and head_dim \(2, 1, 5\) .* got \(2, 4, 8\)"):
        convert(static, StaticCache.init(CONFIGS[0], batch_size=3))
    with pytest.raises(CacheError, match=r"target: expected an empty cache, got rows of \[20, 3, 9\] tokens"):
        convert(static, static)
    with pytest.raises(CacheError, match="outside jit"):
        jax.jit(convert)(static, StaticCache.init(CONFIG, batch_size=3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fork_repeats_every_row(static, layout):
    cache = convert(static, make_cache(CONFIG, layout, batch_size=3))
    branches = fork(cache, 2)
    assert branches.lengths.tolist() == [20, 20, 3, 3, 9, 9]
    assert_equal_contents(branches, static.select([0, 0, 1, 1, 2, 2]))
    for bad in (0, -1, 1.5, True, None):
        with pytest.raises(CacheError, match="branches: expected a whole number from 1 up"):
            fork(cache, bad)


def test_concat_undoes_split(static):
    for layout in ("static", "dynamic", "rotating:28+3"):
        cache = convert(static, make_cache(CONFIG, layout, batch_size=3))
        parts = split(cache, [1, 2])
        assert [part.lengths.tolist() for part in parts] == [[20], [3, 9]]
        assert_equal_contents(concat(parts), static)
        assert concat([cache]) is cache


def test_dynamic_caches_grow_to_the_largest_of_them(static):
    small = DynamicCache.init(CONFIG, batch_size=1).reserve(5).advance(5)
    large = convert(static, DynamicCache.init(CONFIG, batch_size=3))
    assert (small.slots, large.slots) == (16, 24)
    for caches, lengths in (([small, large], [5, 20, 3, 9]), ([large, small], [20, 3, 9, 5])):
        joined = concat(iter(caches))
        assert (joined.slots, joined.batch_size, joined.lengths.tolist()) == (24, 4, lengths)
    assert_equal_contents(concat([small, large]).select([1, 2, 3]), static)


def test_caches_that_do_not_fit_together_are_refused(static):
    with pytest.raises(CacheError, match="expected at least one cache, got none"):
        concat([])
    with pytest.raises(CacheError, match=r"one class, StaticCache, got a DynamicCache in caches\[1\]"):
        concat([static, DynamicCache.init(CONFIG)])
    with pytest.raises(CacheError, match=r"rows of arrays \(1, 32, 5\), got \(1, 16, 5\) in caches\[2\]"):
        concat([static, static, StaticCache.init(CONFIG, capacity=16)])
    with pytest.raises(CacheError, match=r"limit=64.*got DynamicCache.*limit=32"):
        concat([DynamicCache.init(CONFIG), DynamicCache.init(CONFIG, capacity=32)])
    with pytest.raises(CacheError, match=r"window=5, sinks=0.*window=4, sinks=1"):
        concat([make_cache(CONFIG, "rotating:5"), make_cache(CONFIG, "rotating:4+1")])
    with pytest.raises(CacheError, match="bfloat16"):
        concat([static, StaticCache.init(CONFIG, capacity=32, dtype="bfloat16")])


def test_impossible_sizes_are_refused(static):
    for sizes in ([], [3, 1], [1, 1], [0, 3], [4, -1], [1.0, 2.0]):
        with pytest.raises(CacheError, match="sizes: expected numbers from 1 up that add up to 3 rows"):
            split(static, sizes)


def test_a_full_row_is_not_touched_by_the_steps_of_the_others():
    """A write of nothing at the end of the buffer must not land on the last token."""
    batch = make_batch([16, 5, 3])
    cache = StaticCache.init(CONFIG, batch_size=3, capacity=16)
    _, cache = feed(CONFIG, cache, batch, in_chunks([16, 3, 3], 16))
    logits, after = feed(CONFIG, cache, batch, in_chunks([0, 2, 0], 1), start=[16, 3, 3])
    assert_equal_contents(after.select([0, 2]), cache.select([0, 2]))
    assert_close(logits[1, 3:5], uncached(CONFIG, batch)[1, 3:5])


OTHER = make_config(layers=2, heads=4, kv_heads=1, head_dim=8)
MANY = ["static", "dynamic", "rotating:5", "paged", "int8", "h2o:5"]


@pytest.mark.parametrize("spec", MANY)
def test_a_cache_of_another_model_is_refused(spec):
    cache, tokens = make_cache(OTHER, spec), np.ones((1, 3), np.int32)
    for use in (lj.forward, lj.prefill):
        with pytest.raises(
            CacheError, match=r"cache: expected layers, kv heads and head_dim \(.*as the model has, got"
        ):
            use(make_params(CONFIG), CONFIG, tokens, cache)


@pytest.mark.parametrize("spec", MANY)
def test_counts_and_lengths_that_cannot_be(spec):
    cache = make_cache(CONFIG, spec, batch_size=2)
    _, heads, head_dim = cache.dims
    k = jnp.ones((2, 2, heads, head_dim))
    for count in (-1, [-1, 2], 1.5, [1, 1, 1]):
        with pytest.raises(CacheError, match="count: expected one number of 0 or more, or one per row"):
            cache.advance(np.asarray(count))
    with pytest.raises(CacheError, match="count: expected at most 2, the number of tokens, got 5"):
        cache.update(0, k, k, 5)
    for length in (-1, 2.5, True, [1, 2, 3]):
        with pytest.raises(CacheError, match="crop: expected 1 or 2 whole numbers of 0 or more"):
            cache.crop(length)


@pytest.mark.parametrize("settings", [{"batch_size": 1.5}, {"batch_size": "2"}, {"capacity": 16.0}])
def test_sizes_must_be_whole_numbers(settings):
    with pytest.raises(LlorchError, match=next(iter(settings))):
        StaticCache.init(CONFIG, **settings)


def test_donated_buffers_are_named():
    cache = make_cache(CONFIG, "paged", batch_size=2)
    one, two = split(cache, [1, 1])
    lj.prefill(make_params(CONFIG), CONFIG, np.ones((1, 3), np.int32), one)
    with pytest.raises(CacheError, match="donated to a later step, itself or through a cache with the same buffers"):
        lj.prefill(make_params(CONFIG), CONFIG, np.ones((1, 3), np.int32), two)


def test_a_cache_that_cannot_grow_inside_jit_is_refused():
    @jax.jit
    def run(tokens, cache):
        return lj.generate_tokens(make_params(CONFIG), CONFIG, tokens, 20, cache)[0]

    for spec in ("dynamic", "paged:8", "h2o:8"):
        with pytest.raises(CapacityError, match="which cannot grow inside jit; call its `reserve` before"):
            run(jnp.ones((1, 30), jnp.int32), make_cache(CONFIG, spec))


def test_joining_paged_caches_again_and_again_keeps_the_pool_small():
    cache = make_cache(CONFIG, "paged", batch_size=2, page_size=8)
    params, tokens = make_params(CONFIG), np.arange(10, dtype=np.int32).reshape(2, 5)
    _, cache = lj.forward(params, CONFIG, tokens, cache)
    pages, expected = cache.num_pages, None
    for _ in range(3):
        one, two = split(cache, [1, 1])
        _, one = lj.forward(params, CONFIG, tokens[:1, :1], one)
        _, two = lj.forward(params, CONFIG, tokens[1:, :1], two)
        cache = concat([one, two])
        assert cache.num_pages == pages
    dense = StaticCache.init(CONFIG, batch_size=2)
    for part in (tokens, *[tokens[:, :1]] * 3):
        expected, dense = lj.forward(params, CONFIG, part, dense)
    logits, _ = lj.forward(params, CONFIG, tokens[:, 1:2], cache)
    expected, _ = lj.forward(params, CONFIG, tokens[:, 1:2], dense)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
