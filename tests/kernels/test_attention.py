"""Native attention compared with its twin: every codec, slots and pages, masks, bits, derivatives, refusals."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax.attention import DenseView, Queries, allowed_slots, attend
from llorch_jax.cache.codecs import CODECS, make_codec
from llorch_jax.cache.paged.view import PagedView
from llorch_jax.cache.views import Exact, SlotView
from llorch_jax.kernels import describe

pytestmark = pytest.mark.skipif(describe().isa is None, reason=f"no native kernels: {describe().reason}")

SCALE = 0.25


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


def slot_view(codec, rng, batch, heads, slots, head_dim, **settings):
    """A view of random vectors in slots; slot s holds position s."""
    codec = make_codec(codec, head_dim)
    keys, values = (codec.encode(normal(rng, batch, heads, slots, head_dim)) for _ in "kv")
    positions = jnp.arange(slots, dtype=jnp.int32)[None]
    return SlotView(keys, values, positions, codec=codec, **settings)


def paged_view(codec, rng, batch, heads, pages, page_size, head_dim):
    """A view of the same number of pages per row, in any order and partly shared."""
    codec = make_codec(codec, head_dim)
    keys, values = (codec.encode(normal(rng, pages + 1, heads, page_size, head_dim)) for _ in "kv")
    tables = jnp.asarray(rng.integers(0, pages + 1, (batch, pages)), jnp.int32)
    positions = jnp.arange(pages * page_size, dtype=jnp.int32)[None]
    return PagedView(keys, values, tables, positions, codec=codec)


def exact_vectors(rng, batch, heads, marks, head_dim, start=None):
    """Exact vectors of the tokens at positions `marks` int [B, R]; where marks do not fit their index, of none."""
    shape = (batch, heads, np.shape(marks)[1], head_dim)
    return Exact(normal(rng, *shape), normal(rng, *shape), jnp.asarray(marks, jnp.int32), start)


@cache
def attention():
    return jax.jit(lambda q, view, queries: view.attend(q, queries, SCALE))


def runs_natively(q, view, queries):
    return "llorch_attention" in attention().lower(q, view, queries).as_text()


def native(q, view, queries):
    return np.asarray(attention()(q, view, queries))


@cache
def twin():
    def plain(q, view, queries):
        dense = view.dense()
        return attend(q, dense, queries, SCALE), allowed_slots(queries.positions, dense, queries.window)

    return jax.jit(plain)


def check(q, view, queries):
    """Compares kernel and twin, but for queries that see no slot at all, which get zeros from the kernel."""
    expected, allowed = twin()(q, view, queries)
    sees = np.any(allowed, axis=-1)  # [B, 1 or K, T]
    heads = jax.tree.leaves(view.keys)[0].shape[1]
    by_head = np.broadcast_to(sees, (sees.shape[0], heads, sees.shape[2])).transpose(0, 2, 1)
    by_query = np.repeat(by_head, q.shape[2] // heads, axis=2)[..., None]
    np.testing.assert_allclose(native(q, view, queries), np.where(by_query, expected, 0), rtol=2e-5, atol=2e-6)


@examples(20)
@given(
    codec=st.sampled_from(CODECS),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 1, 2, 5, 17, 40]),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    slots=st.sampled_from([1, 7, 64, 65, 300, 520]),
    head_dim=st.sampled_from([1, 7, 16, 33, 64]),
    window=st.sampled_from([None, 3, 100]),
    ring=st.sampled_from([None, 50]),
)
def test_slots_of_any_shape_and_codec(codec, seed, batch, tokens, heads, group, slots, head_dim, window, ring):
    rng = np.random.default_rng(seed)
    view = slot_view(codec, rng, batch, heads, slots, head_dim, window=ring, sinks=2 if ring else 0)
    if seed % 2:  # heads that hold different tokens, and empty slots after them
        filled = np.sort(rng.integers(0, 2 * slots, (batch, heads, slots)), axis=2)
        filled[:, :, slots - slots // 4 :] = -1
        view = view.replace(positions=jnp.asarray(filled, jnp.int32))
    if seed % 3 == 0:
        marks = np.asarray([[8, 9, 2, 3, 4, 5]] * batch)  # at index p % 6 the token at position p, or an older one
        own = exact_vectors(rng, batch, heads, [[11, 12]] * batch, head_dim, jnp.full(batch, 11, jnp.int32))
        view = view.replace(exact=(exact_vectors(rng, batch, heads, marks, head_dim), own))
    positions = jnp.asarray(np.sort(rng.integers(slots // 2, slots + 1, (batch, tokens)), axis=1), jnp.int32)
    check(normal(rng, batch, tokens, heads * group, head_dim), view, Queries(positions, window=window))


@examples(8)
@given(
    codec=st.sampled_from(CODECS),
    seed=st.integers(0, 2**16),
    page_size=st.sampled_from([1, 5, 16, 32]),
    pages=st.integers(1, 12),
)
def test_pages_of_any_size_and_codec(codec, seed, page_size, pages):
    rng = np.random.default_rng(seed)
    view = paged_view(codec, rng, 2, 2, pages, page_size, 16)
    positions = jnp.asarray(rng.integers(0, pages * page_size, (2, 1)), jnp.int32)
    q = normal(rng, 2, 1, 4, 16)
    assert runs_natively(q, view, Queries(positions))
    check(q, view, Queries(positions))


@pytest.mark.parametrize("codec", CODECS)
def test_a_row_has_the_same_bits_in_any_batch_capacity_and_layout(codec):
    rng = np.random.default_rng(0)
    view = slot_view(codec, rng, 3, 2, 600, 64)
    q, positions = normal(rng, 3, 2, 4, 64), jnp.asarray([[9, 10], [299, 300], [80, 81]], jnp.int32)
    assert runs_natively(q, view, Queries(positions))
    together = native(q, view, Queries(positions))

    def part(rows, slots, tokens):
        def cut(stored):
            return jax.tree.map(lambda array: array[rows, :, :slots], stored)

        some = view.replace(keys=cut(view.keys), values=cut(view.values), positions=view.positions[:, :slots])
        return native(q[rows, tokens], some, Queries(positions[rows, tokens]))

    np.testing.assert_array_equal(part(slice(1, 2), 301, slice(0, 2)), together[1:2])
    np.testing.assert_array_equal(part(slice(0, 1), 64, slice(0, 2)), together[0:1])
    np.testing.assert_array_equal(part(slice(0, 3), 600, slice(1, 2)), together[:, 1:])
    pools = jax.tree.map(
        lambda array: array[:, :, :576].reshape(3, 2, 18, 32, -1).swapaxes(1, 2).reshape(54, 2, 32, -1),
        (view.keys, view.values),
    )
    paged = PagedView(*pools, jnp.arange(54, dtype=jnp.int32).reshape(3, 18), view.positions[:, :576], codec=view.codec)
    np.testing.assert_array_equal(native(q, paged, Queries(positions)), together)


def test_numbers_in_slots_that_are_not_seen_do_not_matter():
    rng = np.random.default_rng(0)
    view = slot_view("float32", rng, 1, 1, 70, 16)
    q, queries = normal(rng, 1, 1, 1, 16), Queries(jnp.asarray([[40]], jnp.int32))
    clean = native(q, view, queries)
    spoilt = view.replace(keys=view.keys.at[0, 0, 41:].set(np.nan), values=view.values.at[0, 0, 41:].set(np.inf))
    np.testing.assert_array_equal(native(q, spoilt, queries), clean)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_a_number_is_not_hidden(number):
    rng = np.random.default_rng(0)
    view = slot_view("float32", rng, 2, 1, 70, 16)
    q, queries = normal(rng, 2, 1, 1, 16), Queries(jnp.asarray([[60], [60]], jnp.int32))
    clean = native(q, view, queries)
    for spoilt in (
        view.replace(keys=view.keys.at[0, 0, 7].set(number)),
        view.replace(values=view.values.at[0, 0, 7].set(number)),
    ):
        got = native(q, spoilt, queries)
        assert not np.isfinite(got[0]).any()
        np.testing.assert_array_equal(got[1], clean[1])


def test_huge_scores_do_not_overflow():
    rng = np.random.default_rng(0)
    view = slot_view("float32", rng, 1, 2, 130, 16)
    check(100 * normal(rng, 1, 1, 2, 16), view.replace(keys=100 * view.keys), Queries(jnp.asarray([[129]], jnp.int32)))


def test_a_query_that_sees_nothing_gets_zeros():
    rng = np.random.default_rng(0)
    view = slot_view("int8", rng, 1, 1, 70, 16).replace(positions=jnp.full((1, 70), -1, jnp.int32))
    np.testing.assert_array_equal(native(normal(rng, 1, 1, 1, 16), view, Queries(jnp.asarray([[5]], jnp.int32))), 0)


def test_derivatives_and_batches_go_through_the_twin():
    rng = np.random.default_rng(0)
    view, queries = slot_view("float32", rng, 1, 2, 20, 8), Queries(jnp.asarray([[11]], jnp.int32))
    q = normal(rng, 1, 1, 2, 8)

    def total(function):
        return lambda q, keys: jnp.sum(jnp.square(function(q, view.replace(keys=keys))))

    by_kernel = total(lambda q, view: view.attend(q, queries, SCALE))
    by_twin = total(lambda q, view: attend(q, view.dense(), queries, SCALE))
    for got, expected in zip(
        jax.grad(by_kernel, (0, 1))(q, view.keys), jax.grad(by_twin, (0, 1))(q, view.keys), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    several = jnp.stack([q, 2 * q])
    np.testing.assert_allclose(
        jax.vmap(by_kernel, (0, None))(several, view.keys), [by_twin(each, view.keys) for each in several], rtol=1e-5
    )


def test_the_twin_serves_for_many_queries_of_wide_heads():
    rng = np.random.default_rng(0)
    for head_dim, expected in ((256, True), (257, False)):
        view = slot_view("float32", rng, 1, 1, 70, head_dim)
        for tokens, heads in ((17, 1), (1, 65)):
            queries = Queries(jnp.zeros((1, tokens), jnp.int32))
            assert runs_natively(normal(rng, 1, tokens, heads, head_dim), view, queries) == expected


@pytest.mark.parametrize("tokens", [3, 20])
def test_what_is_not_a_number_stays_not_a_number(tokens):
    rng = np.random.default_rng(0)
    view = slot_view("float32", rng, 1, 1, 70, 16)
    q = normal(rng, 1, tokens, 1, 16).at[0, 1].set(jnp.nan)
    got = native(q, view, Queries(jnp.full((1, tokens), 60, jnp.int32)))
    assert np.isnan(got[0, 1]).all()
    assert np.isfinite(np.delete(got, 1, axis=1)).all()


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_slots_that_no_query_sees_may_hold_what_is_not_a_number(codec):
    rng = np.random.default_rng(0)
    view = slot_view(codec, rng, 1, 2, 130, 16)
    q, queries = normal(rng, 1, 40, 2, 16), Queries(jnp.arange(30, 70, dtype=jnp.int32)[None], window=20)
    expected = native(q, view, queries)

    def spoil(stored):
        def last(leaf):
            return leaf.at[:, :, 70:].set(jnp.nan).at[:, :, :10].set(jnp.nan) if leaf.dtype == jnp.float32 else leaf

        return jax.tree.map(last, stored)

    spoilt = view.replace(keys=spoil(view.keys), values=spoil(view.values))
    np.testing.assert_array_equal(native(q, spoilt, queries), expected)


@examples(10)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.sampled_from([1, 5, 40]),
    group=st.integers(1, 3),
    window=st.sampled_from([None, 9]),
)
def test_plain_vectors(seed, tokens, group, window):
    rng = np.random.default_rng(seed)
    positions = jnp.arange(tokens, dtype=jnp.int32)[None]
    view = DenseView(normal(rng, 2, 2, tokens, 24), normal(rng, 2, 2, tokens, 24), positions)
    q = normal(rng, 2, tokens, 2 * group, 24)
    queries = Queries(jnp.broadcast_to(positions, (2, tokens)), window=window, start=0)
    assert runs_natively(q, view, queries)
    np.testing.assert_allclose(native(q, view, queries), attend(q, view, queries, SCALE), rtol=2e-5, atol=2e-6)


def test_a_panel_of_queries_has_the_same_bits_whatever_the_others_are():
    rng = np.random.default_rng(0)
    view = slot_view("int8", rng, 1, 2, 300, 32)
    q, positions = normal(rng, 1, 70, 4, 32), jnp.arange(200, 270, dtype=jnp.int32)[None]
    together = native(q, view, Queries(positions))
    for first in (1, 13, 40):
        some = native(q[:, first:], view, Queries(positions[:, first:]))
        np.testing.assert_array_equal(some, together[:, first:])


def arguments(**changed):
    """Those of a correct custom call, but for some."""
    vectors, none = jnp.zeros((2, 1, 8, 4), jnp.float32), jnp.zeros(0, jnp.float32)
    correct = {
        "q": jnp.zeros((2, 1, 3, 4), jnp.float32),
        "query_positions": jnp.zeros((2, 1), jnp.int32),
        "keys": vectors,
        "key_scales": none,
        "key_zeros": none,
        "values": vectors,
        "value_scales": none,
        "value_zeros": none,
        "positions": jnp.zeros((1, 1, 8), jnp.int32),
        "tables": jnp.zeros((0, 0), jnp.int32),
    }
    return list((correct | changed).values())


WRONG = {
    "queries of another rank": (r"q: expected \[B, T, N, H\], got \[2, 3, 4\]", {"q": jnp.zeros((2, 3, 4))}),
    "queries of another type": ("q: expected float32", {"q": jnp.zeros((2, 1, 3, 4), jnp.int32)}),
    "rows that differ": (r"keys: expected 3 rows, got \[2, 1, 8, 4\]", {"q": jnp.zeros((3, 1, 3, 4))}),
    "another head size": ("keys: expected elements of one type", {"q": jnp.zeros((2, 1, 3, 5))}),
    "positions of other queries": (
        r"query positions: expected int32 \[2, 1\], got \[2, 2\]",
        {"query_positions": jnp.zeros((2, 2), jnp.int32)},
    ),
    "keys of another type": ("keys: expected float32, uint16", {"keys": jnp.zeros((2, 1, 8, 4), jnp.int32)}),
    "values of another type": (
        "values: expected elements of one type",
        {"values": jnp.zeros((2, 1, 8, 4), jnp.float16)},
    ),
    "positions of other slots": ("positions: expected one row or 2", {"positions": jnp.zeros((1, 1, 9), jnp.int32)}),
    "tables of another rank": (r"tables: expected int32 \[B, N\]", {"tables": jnp.zeros(3, jnp.int32)}),
    "tables of other rows": (r"tables: expected int32 \[2, 1\]", {"tables": jnp.zeros((1, 1), jnp.int32)}),
    "exact vectors in part": ("exact vectors: expected four arrays", {"exact": jnp.zeros(3)}),
}


def call(arrays, bits=32, workspace=4 * 2 * 3 * 18):
    out = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
    target = jax.ffi.ffi_call("llorch_attention", (out, jax.ShapeDtypeStruct((workspace,), jnp.uint8)))
    settings = {name: np.int64(0) for name in ("window", "view_window", "sinks")}
    return jax.block_until_ready(target(*arrays, bits=np.int64(bits), scale=np.float32(1), **settings))


def test_the_correct_call_is_correct():
    np.testing.assert_array_equal(call(arguments())[0], 0)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_names_the_argument(name):
    message, wrong = WRONG[name]
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"llorch_attention: {message}"):
        call(arguments(**wrong))


def test_a_small_workspace_and_missing_scales_are_named():
    with pytest.raises(jax.errors.JaxRuntimeError, match="workspace: expected 432 bytes, got 8"):
        call(arguments(), workspace=8)
    codes = jnp.zeros((2, 1, 8, 4), jnp.int8)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"keys scales: expected float32 \[2, 1, 8, 1\]"):
        call(arguments(keys=codes, values=codes), bits=8)
