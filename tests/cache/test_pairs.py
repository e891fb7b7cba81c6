"""Every layout with every codec: what a layout keeps, a codec stores, and both say exactly how much that takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import LAYOUT_SPECS, assert_close, decode_copies, feed, in_chunks, make_batch, make_config
from profiles import pairs

from llorch_jax.cache import load_cache, make_cache, save_cache
from llorch_jax.cache.codecs import CODECS
from llorch_jax.cache.layouts import LAYOUTS
from llorch_jax.cache.static import StaticCache
from llorch_jax.errors import CacheError

CONFIG = make_config(layers=1, heads=4, kv_heads=2, head_dim=5)  # grouped-query, odd head_dim
LENGTHS = np.array([19, 4, 11], np.int32)
FORMS = [("float32", 0), ("bfloat16", 0), ("float16", 0), ("int8", 0), ("bfloat16", 6), ("int8", 6), ("int4", 6)]
assert {codec for codec, _ in FORMS} == set(CODECS), "a new codec needs a form here"
NAMES = [name for name, layout in LAYOUTS.items() if "codec" in layout.takes]


def each_pair(turn):
    found = [(name, *form) for name, form in pairs(NAMES, FORMS, turn)]
    return pytest.mark.parametrize(("name", "codec", "residual"), found)


WHOLE = {
    "rotating": "rotating:24+3",
    "recent": "recent:24",
    "sinks": "sinks:24",
    "h2o": "h2o:24",
    "snapkv": "snapkv:24",
}


def make(name, codec, residual, batch_size=3, whole=True, **settings):
    spec = WHOLE.get(name, LAYOUT_SPECS[name]) if whole else LAYOUT_SPECS[name]
    return make_cache(CONFIG, spec, batch_size=batch_size, codec=codec, residual=residual, **settings)


@jax.jit
def append(cache, k, v, count):
    after, view = cache.append(0, k, v, count)
    return after.advance(count), view.dense()


@jax.jit
def shown(cache):
    return cache.read(0).dense()


def vectors(seed, width, batch=3):
    return np.random.default_rng(seed).standard_normal((2, batch, width, 2, 5)).astype(np.float32)


def held(view, row, head, length):
    """Keys and values of a row and head by position, as far as the view has them."""
    positions = np.broadcast_to(np.asarray(view.positions)[:, None] if view.positions.ndim == 2 else view.positions,
                                view.k.shape[:3])[row, head]  # fmt: skip
    return {
        int(p): (np.asarray(view.k)[row, head, slot], np.asarray(view.v)[row, head, slot])
        for slot, p in enumerate(positions)
        if 0 <= p < length
    }


@each_pair(0)
def test_shows_what_a_static_cache_of_the_same_codec_shows(name, codec, residual):
    """Keys and values by position, for the queries of each append and afterwards, as long as nothing is dropped."""
    caches = (
        make(name, codec, residual),
        StaticCache.init(CONFIG, batch_size=3, capacity=32, codec=codec, residual=residual),
    )
    lengths = np.zeros(3, np.int32)
    for step, count in enumerate(([5, 0, 2], [1, 1, 1], [4, 3, 0], [1, 0, 1])):
        width = 5 if max(count) > 1 else 1
        k, v = vectors(step, width)
        counts = np.array(count, np.int32)
        (cache, seen), (static, expected) = (append(each.reserve(counts), k, v, counts) for each in caches)
        caches = cache, static
        lengths = lengths + counts
        for views in ((seen, expected), tuple(shown(each) for each in caches)):
            for row, head in np.ndindex(3, 2):
                got, wanted = (held(view, row, head, lengths[row]) for view in views)
                assert got.keys() == wanted.keys()
                for position, pair in wanted.items():
                    np.testing.assert_array_equal(got[position], pair)


@each_pair(1)
def test_says_exactly_how_much_it_takes_and_survives_a_file(name, codec, residual, tmp_path):
    cache = make(name, codec, residual, whole=False)
    k, v = vectors(0, 5)
    cache, _ = append(cache.reserve(5), k, v, np.array([5, 2, 4], np.int32))
    elements = 2 * 5 * cache.codec.bits_per_element / 8
    leaves = jax.tree.leaves((cache.keys, cache.values))
    slots = leaves[0].shape[0] * leaves[0].shape[2]
    assert sum(leaf.nbytes for leaf in leaves) == slots * 2 * elements
    save_cache(tmp_path / "cache.safetensors", cache)
    loaded = load_cache(tmp_path / "cache.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)
    assert jax.tree.all(jax.tree.map(lambda one, other: np.array_equal(one, other), loaded, cache))


@each_pair(2)
def test_rows_are_inserted_freed_and_chosen(name, codec, residual):
    k, v = vectors(1, 5)
    cache, _ = append(make(name, codec, residual).reserve(5), k, v, np.array([5, 2, 4], np.int32))
    more, w = vectors(2, 5, batch=2)
    source, _ = append(make(name, codec, residual, batch_size=2).reserve(5), more, w, np.array([3, 5], np.int32))
    inserted = cache.insert([2, 0], source)
    assert inserted.lengths.tolist() == [5, 2, 3]
    for row, (origin, there, length) in enumerate([(source, 1, 5), (cache, 1, 2), (source, 0, 3)]):
        got, wanted = shown(inserted), shown(origin)
        for head in range(2):
            found, expected = held(got, row, head, length), held(wanted, there, head, length)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[p], expected[p]) for p in expected)
    freed = inserted.free([1])
    assert freed.lengths.tolist() == [5, 0, 3]
    assert held(shown(freed), 0, 1, 5).keys() == held(shown(inserted), 0, 1, 5).keys()
    assert cache.lengths.tolist() == [5, 2, 4]  # as if none of it had happened
    for slots in ([0, 0], [0, 3], [0]):
        with pytest.raises(CacheError, match=r"slots|rows"):
            cache.insert(slots, source)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("codec", "residual"), [("int8", 6), ("bfloat16", 0)])
def test_a_forward_pass_equals_that_of_a_static_cache_of_the_same_codec(name, codec, residual):
    batch = make_batch(LENGTHS)
    chunks = [*in_chunks(LENGTHS - 2, 20), *in_chunks([1, 1, 1], 1), *in_chunks([1, 1, 1], 1)]
    got, _ = feed(CONFIG, make(name, codec, residual), batch, chunks)
    static = StaticCache.init(CONFIG, batch_size=3, capacity=32, codec=codec, residual=residual)
    expected, _ = feed(CONFIG, static, batch, chunks)
    assert_close(got, expected, 0.02)  # a code may tip over


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_decode_step_writes_in_place(name, codec):
    assert decode_copies(CONFIG, make(name, codec, 6, batch_size=2).reserve(1)) == []


def test_insert_in_jit_writes_in_place_and_takes_a_smaller_source():
    cache = StaticCache.init(CONFIG, batch_size=3, capacity=32, codec="int8", residual=16)
    k, v = vectors(3, 5, batch=1)
    small = StaticCache.init(CONFIG, capacity=16, codec="int8", residual=16)
    source, _ = append(small, k, v, np.array([4], np.int32))
    where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.keys)]
    insert = jax.jit(lambda cache, slots, source: cache.insert(slots, source), donate_argnums=0)
    after = insert(cache, jnp.asarray([1], jnp.int32), source)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.keys)] == where
    assert after.lengths.tolist() == [0, 4, 0]


def test_custom_codecs_are_accepted():
    class Halved:
        """Stores half of everything, and so must decode twice of it."""

        name, head_dim, lossless, exact_append, bits_per_element = "halved", 5, True, False, 32.0
        dtype = jnp.dtype(jnp.float32)
        zeros = staticmethod(lambda leading: jnp.zeros((*leading, 5)))
        encode = staticmethod(lambda x: x / 2)
        decode = staticmethod(lambda stored: stored * 2)

    k, v = vectors(4, 5)
    make_own = partial(StaticCache.init, CONFIG, batch_size=3, capacity=32)
    cache, seen = append(make_own(codec=Halved()), k, v, np.array([5, 2, 4], np.int32))
    _, expected = append(make_own(), k, v, np.array([5, 2, 4], np.int32))
    np.testing.assert_array_equal(seen.k, expected.k)
    np.testing.assert_allclose(cache.keys[0][0, :, 0], k[0, 0] / 2)
    with pytest.raises(CacheError, match="codec: expected one for a head_dim of 4"):
        StaticCache.init(make_config(head_dim=4), codec=Halved())
