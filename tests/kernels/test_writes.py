"""Native writes of tokens: the same bits as XLA's updates, and in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from twins import twins

from llorch_jax.cache.paged.arrays import write_pages
from llorch_jax.cache.writes import write_ring, write_rows
from llorch_jax.kernels import describe

pytestmark = pytest.mark.skipif(describe().isa is None, reason=f"no native kernels: {describe().reason}")

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint8"]
WRITES = {
    "rows": jax.jit(write_rows),
    "ring": jax.jit(write_ring, static_argnames="sinks"),
    "pages": jax.jit(write_pages),
}


def make(rng, kind, dtype, tokens):
    """An array, new tokens, and where they belong; some rows are full, some tokens padding."""
    rows, heads, slots, width = 3, 2, 6, int(rng.integers(1, 9))
    shape = (7 if kind == "pages" else rows, heads, slots, width)
    array = jnp.asarray(rng.integers(0, 100, shape), dtype)
    new = jnp.asarray(rng.integers(0, 100, (rows, tokens, heads, width)), dtype)
    counts = rng.integers(0, tokens + 1, rows).astype(np.int32)
    if kind == "rows":  # tokens past the end are padding
        return array, new, rng.integers(0, slots + 1, rows).astype(np.int32)
    if kind == "ring":
        return array, new, rng.integers(0, 30, rows).astype(np.int32), counts
    tables = np.array([[4, 1, -1], [-1, 0, 6], [2, -1, -1]], np.int32)
    starts = np.array([rng.integers(0, 13), rng.integers(6, 19), rng.integers(0, 7)], np.int32)
    return array, new, tables, starts, counts


@examples(12)
@given(
    kind=st.sampled_from(list(WRITES)),
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([1, 4, 9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_they_leave_the_same_bits_as_the_twins(kind, dtype, tokens, seed):
    arguments = make(np.random.default_rng(seed), kind, dtype, tokens)
    native = WRITES[kind](*arguments)
    with twins():
        plain = WRITES[kind](*arguments)
    assert native.dtype == plain.dtype == dtype
    assert np.array_equal(native, plain)


def test_sinks_of_a_ring_are_kept():
    rng = np.random.default_rng(0)
    array, new, *_ = make(rng, "ring", "float32", 4)
    where = np.array([0, 1, 17], np.int32), np.array([4, 3, 2], np.int32)
    native = WRITES["ring"](array, new, *where, sinks=2)
    with twins():
        plain = WRITES["ring"](array, new, *where, sinks=2)
    assert np.array_equal(native, plain)
    assert np.array_equal(native[2, :, :2], array[2, :, :2])


@pytest.mark.parametrize("kind", WRITES)
def test_a_donated_array_is_written_in_place(kind):
    array, *rest = make(np.random.default_rng(0), kind, "float32", 1)
    write = jax.jit(WRITES[kind], donate_argnums=0)
    compiled = write.lower(array, *rest).compile()
    assert "llorch_write" in compiled.as_text()
    array = array + 0  # a buffer of its own
    before = array.unsafe_buffer_pointer()
    assert compiled(array, *rest).unsafe_buffer_pointer() == before


def test_derivatives_and_vmap_are_those_of_the_twin():
    array, new, starts = map(jnp.asarray, make(np.random.default_rng(0), "rows", "float32", 1))

    def weighted(array, new):
        return jnp.sum(write_rows(array, new, starts) * jnp.arange(array.size, dtype=jnp.float32).reshape(array.shape))

    native = jax.grad(weighted, (0, 1))(array, new)
    mapped = jax.vmap(write_rows, (0, None, None))(jnp.stack([array, array + 1]), new, starts)
    with twins():
        plain = jax.grad(weighted, (0, 1))(array, new)
    assert all(np.array_equal(one, other) for one, other in zip(native, plain, strict=True))
    assert np.array_equal(mapped[0], write_rows(array, new, starts))


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (r"array: expected \[R, K, S, X\]", {"array": (2, 3, 4)}),
        (r"tokens: expected elements as in the array \[2, 1, 3, 5\], got \[2, 1, 2, 5\]", {"tokens": (2, 1, 2, 5)}),
        ("tokens: expected elements as in the array", {"type": jnp.int32}),
        (r"rows: expected int32 \[2, 1\], got \[2, 2\]", {"rows": (2, 2)}),
        (r"slots: expected int32 \[2, 1\], got \[1, 1\]", {"slots": (1, 1)}),
    ],
)
def test_a_wrong_call_names_the_argument(message, wrong):
    call = {"array": (2, 3, 4, 5), "tokens": (2, 1, 3, 5), "rows": (2, 1), "slots": (2, 1), "type": jnp.float32} | wrong
    array = jnp.zeros(call["array"], jnp.float32)
    target = jax.ffi.ffi_call(
        "llorch_write", jax.ShapeDtypeStruct(array.shape, array.dtype), input_output_aliases={0: 0}
    )
    tokens = jnp.zeros(call["tokens"], call["type"])
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"llorch_write: {message}"):
        jax.block_until_ready(target(array, tokens, jnp.zeros(call["rows"], int), jnp.zeros(call["slots"], int)))
