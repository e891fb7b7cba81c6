"""Native products compared with their twins: every format, odd shapes, bits, derivatives, refusals."""

import threading
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax.kernels import describe
from llorch_jax.kernels import matmul as kernels
from llorch_jax.linear import QuantizedMatrix, matmul, plain_matmul

pytestmark = pytest.mark.skipif(describe().isa is None, reason=f"no native kernels: {describe().reason}")

FLOATS = ("float32", "bfloat16", "float16")
CODES = [(8, None), (8, None, 8), (8, 32), (8, 64), (8, 128), (4, 32), (4, 64)]
FORMATS = [*FLOATS, *CODES]


def make_weight(form, rows, width, seed=0):
    """A random matrix [rows, width] of a format."""
    rng = np.random.default_rng(seed)
    if isinstance(form, str):
        return jnp.asarray(rng.standard_normal((rows, width)), form)
    bits, group, *x_bits = form
    padding = -width % (group or 1)
    groups = (width + padding) // group if group else 1
    scales = rng.standard_normal((rows, groups))
    if bits == 8:
        codes = rng.integers(-127, 128, (rows, width + padding)).astype(np.int8)
    else:
        codes = rng.integers(0, 256, (rows, (width + padding) // 2)).astype(np.uint8)
    dtype = jnp.float16 if group else jnp.float32
    return QuantizedMatrix(jnp.asarray(codes), jnp.asarray(scales, dtype), bits, group, padding, *x_bits)


def values(weight):
    """The matrix in float64."""
    dense = weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight
    return np.asarray(dense, np.float64)


def make_x(width, columns, seed=1):
    return np.random.default_rng(seed).standard_normal((width, columns), dtype=np.float32)


def runs_natively(function, *args):
    return "llorch_matmul" in jax.jit(function).lower(*args).as_text()


@cache
def product():
    return jax.jit(matmul)


def many_columns():
    return st.tuples(st.integers(48, 64), st.integers(17, 70))


@examples(25)
@given(
    form=st.sampled_from(FORMATS),
    rows_and_columns=st.tuples(st.integers(1, 40), st.integers(1, 16)) | many_columns(),
    width=st.integers(1, 300) | st.just(600),
)
def test_products_equal_those_of_numpy(form, rows_and_columns, width):
    rows, columns = rows_and_columns
    weight, x = make_weight(form, rows, width), make_x(width, columns)
    assert runs_natively(matmul, weight, x) == (form != "float32" or columns <= 16)
    dense = values(weight)
    # Codes err by up to half a step of the largest element; what float32 adds is smaller.
    per_element = np.abs(x).max() * (1e-6 if isinstance(form, str) else 1 / 254 if form[2:] == (8,) else 1 / 65534)
    allowed = np.linalg.norm(dense, axis=1, keepdims=True) * per_element * np.sqrt(width) + 1e-6
    np.testing.assert_array_less(np.abs(product()(weight, x) - dense @ x), np.broadcast_to(allowed, (rows, columns)))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_column_has_the_same_bits_wherever_it_stands(form):
    weight, x = make_weight(form, 37, 200), make_x(200, 16)
    together = np.asarray(product()(weight, x))
    for columns in (1, 2, 3, 8):
        some = np.asarray(product()(weight, x[:, 16 - columns :]))
        np.testing.assert_array_equal(some, together[:, 16 - columns :], f"{columns} columns")


@pytest.mark.parametrize("form", FORMATS[1:], ids=str)
def test_a_column_among_many_has_the_same_bits_wherever_it_stands(form):
    weight, x = make_weight(form, 61, 600), make_x(600, 100)
    together = np.asarray(product()(weight, x))
    for columns in (17, 33, 64):
        some = np.asarray(product()(weight, x[:, 100 - columns :]))
        np.testing.assert_array_equal(some, together[:, 100 - columns :], f"{columns} columns")


@examples(15)
@given(
    rows_and_columns=st.tuples(st.integers(1, 40), st.integers(1, 16)) | many_columns(),
    width=st.integers(1, 300) | st.integers(1000, 1050) | st.just(3072),
)
def test_products_with_8_bit_columns_are_sums_of_integers_scaled_once(rows_and_columns, width):
    """So neither the number of columns nor the kernel nor the instruction set changes a bit."""
    rows, columns = rows_and_columns
    weight, x = make_weight((8, None, 8), rows, width), make_x(width, columns)
    largest = np.abs(x).max(axis=0)
    codes = np.round(x * (np.float32(127) / largest)).astype(np.int64)
    sums = np.asarray(weight.codes, np.int64) @ codes
    expected = sums.astype(np.float32) * (np.asarray(weight.scales) * (largest / np.float32(127)))
    np.testing.assert_array_equal(product()(weight, x), expected)
    np.testing.assert_allclose(jax.jit(plain_matmul)(weight, x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("columns", [4, 40])
@pytest.mark.parametrize("form", ["float32", (8, None), (8, None, 8), (4, 32)], ids=str)
def test_what_is_not_a_number_stays_in_its_column(form, columns):
    weight, x = make_weight(form, 50, 70), make_x(70, columns)
    clean = np.asarray(product()(weight, x))
    x[3, 1] = np.nan
    x[9, 2] = np.inf
    got = np.asarray(product()(weight, x))
    others = [column for column in range(columns) if column not in (1, 2)]
    np.testing.assert_array_equal(got[:, others], clean[:, others])
    assert not np.isfinite(got[:, [1, 2]]).any()


@pytest.mark.parametrize("columns", [3, 18])
@pytest.mark.parametrize("form", [(8, None), (8, None, 8), (4, 32)], ids=str)
def test_columns_of_zeros_and_of_huge_numbers_keep_their_scale(form, columns):
    weight, x = make_weight(form, 50, 64), make_x(64, columns)
    scales = np.resize(np.float32([0, 1e30, 1e-20]), columns)
    got = np.asarray(product()(weight, x * scales), np.float64)
    np.testing.assert_array_equal(got[:, scales == 0], 0)
    plain = values(weight) @ x
    some = scales > 0
    tolerance = 0.05 if form[2:] == (8,) else 1e-3
    np.testing.assert_allclose(got[:, some] / scales[some], plain[:, some], atol=tolerance * np.abs(plain).max())


def test_subnormal_float16_weights_count():
    weight = jnp.full((3, 40), 2.0**-24, jnp.float16)
    np.testing.assert_array_equal(product()(weight, np.ones((40, 2), np.float32)), np.full((3, 2), 40 * 2.0**-24))


@pytest.mark.parametrize("form", ["float32", (8, 32)], ids=str)
def test_derivatives_and_batches_go_through_the_twin(form):
    weight, x = make_weight(form, 6, 32), make_x(32, 3)
    xs = np.stack([x, x + 1])

    def total(function):
        return lambda x: jnp.sum(jnp.square(function(weight, x))) / 1e4

    np.testing.assert_allclose(jax.grad(total(matmul))(x), jax.grad(total(plain_matmul))(x), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        jax.vmap(matmul, in_axes=(None, 0))(weight, xs), [matmul(weight, each) for each in xs], rtol=1e-3, atol=0.05
    )
    by_row = jax.vmap(jax.grad(total(matmul)))(xs)
    np.testing.assert_allclose(by_row[0], jax.grad(total(matmul))(x), rtol=1e-3, atol=1e-3)


def test_the_gradient_of_float_weights_is_the_twin_s():
    weight, x = make_weight("float32", 6, 32), make_x(32, 3)
    got = jax.grad(lambda w: matmul(w, x).sum())(weight)
    np.testing.assert_allclose(got, np.broadcast_to(x.sum(axis=1), (6, 32)), rtol=1e-5, atol=1e-6)


def test_the_twin_serves_for_many_columns_of_few_rows_or_of_float32_and_for_other_groups():
    assert not runs_natively(matmul, make_weight("float32", 48, 8), make_x(8, 17))
    assert not runs_natively(matmul, make_weight("bfloat16", 4, 8), make_x(8, 17))
    assert runs_natively(matmul, make_weight("bfloat16", 48, 8), make_x(8, 17))
    assert not runs_natively(matmul, make_weight((8, 16), 4, 32), make_x(32, 1))
    assert runs_natively(matmul, make_weight((8, 32), 4, 32), make_x(32, 16))


WRONG = {
    "x has no columns": ("x: expected a column or more", {"x": (8, 0)}),
    "a small workspace for many columns": (
        "workspace: expected 1280 bytes, got 1032",
        {"x": (8, 17), "y": (4, 17), "weight_type": jnp.float16, "bits": 16},
    ),
    "many columns of float32": ("x: expected up to 16 columns for float32", {"x": (8, 17)}),
    "x has too few rows": ("x: expected 8 rows", {"x": (7, 2)}),
    "x has another type": (r"x: expected float32 \[8, 2\]", {"x_type": jnp.int32}),
    "weights of another type": ("weights: expected float32, bfloat16", {"weight_type": jnp.int32}),
    "weights in three dimensions": (r"weights: expected \[out, width\], got \[4, 8, 1\]", {"weight": (4, 8, 1)}),
    "y of another shape": (r"y: expected float32 \[4, 2\], got \[4, 3\]", {"y": (4, 3)}),
    "a small workspace": ("workspace: expected 1032 bytes, got 8", {"workspace": 8}),
    "a group of floats": ("group: expected 0 for floating point, got 32", {"group": 32}),
    "rounded columns of groups": (
        "x_bits: expected 16, or 8 with int8 codes of up to 65536 columns and no groups, got 8",
        {"weight": (4, 32), "weight_type": jnp.int8, "bits": 8, "group": 32, "x_bits": 8},
    ),
    "codes in odd groups": ("group: expected 32", {"weight": (4, 48), "weight_type": jnp.int8, "bits": 8, "group": 48}),
    "codes in half a group": (
        "weights: expected a width",
        {"weight": (4, 48), "weight_type": jnp.int8, "bits": 8, "group": 32},
    ),
    "scales of another shape": (
        r"scales: expected float16 \[4, 1\], got \[3, 1\]",
        {"weight": (4, 32), "weight_type": jnp.int8, "bits": 8, "group": 32, "scales": (3, 1)},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_names_the_argument(name):
    message, wrong = WRONG[name]
    call = {
        "weight": (4, 8),
        "weight_type": jnp.float32,
        "scales": (4, 1),
        "x": (8, 2),
        "x_type": jnp.float32,
        "y": (4, 2),
    }
    call |= {"workspace": 1032, "bits": 32, "group": 0, "x_bits": 16} | wrong
    results = (jax.ShapeDtypeStruct(call["y"], jnp.float32), jax.ShapeDtypeStruct((call["workspace"],), jnp.uint8))
    arrays = [
        jnp.zeros(call["weight"], call["weight_type"]),
        jnp.zeros(call["scales"], jnp.float16),
        jnp.zeros(call["x"], call["x_type"]),
    ]
    native = jax.ffi.ffi_call("llorch_matmul", results)
    attributes = {name: np.int64(call[name]) for name in ("bits", "group", "x_bits")}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"llorch_matmul: {message}"):
        jax.block_until_ready(native(*arrays, **attributes))


def test_programs_of_several_threads_do_not_disturb_each_other():
    weight, x = make_weight((8, None), 3000, 256), make_x(256, 2)
    expected = np.asarray(product()(weight, x))
    wrong = []

    def work():
        for _ in range(50):
            if not np.array_equal(product()(weight, x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forms_without_a_kernel_are_known():
    weight = jnp.zeros((4, 16), jnp.uint8)
    served = {
        group
        for group in (None, 16, 32, 48, 64, 96, 128, 1024, 2048)
        if kernels.serves(kernels.Form(4, group), weight, jnp.zeros((32, 1)))
    }
    assert served == {32, 64, 128, 1024}
