"""Products and look-ups of rows with float and quantized matrices, compared with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax import linear
from llorch_jax.linear import matmul, plain_matmul, take_rows
from llorch_jax.quantization import Codes, quantize_matrix


@examples(8)
@given(rows=st.integers(1, 9), width=st.integers(1, 9), columns=st.integers(1, 3), half=st.booleans())
def test_products_equal_numpy(rows, width, columns, half):
    weight = jax.random.normal(jax.random.key(rows), (rows, width), jnp.bfloat16 if half else jnp.float32)
    x = jax.random.normal(jax.random.key(width), (width, columns))
    got = jax.jit(matmul)(weight, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(weight, np.float64) @ np.asarray(x, np.float64), atol=5e-6)


@pytest.mark.parametrize("form", ["bfloat16", "float16", (8, None), (8, 32), (8, 128), (4, 32), (4, 64)])
@pytest.mark.parametrize("shape", [(8, 64), (7, 33), (1, 200)])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("block", [2**18, 150])  # the whole matrix; a few rows at a time
def test_low_precision_products_are_those_of_the_same_values(form, shape, columns, block, monkeypatch):
    monkeypatch.setattr(linear, "_BLOCK", block)
    weight = jax.random.normal(jax.random.key(0), shape)
    weight = weight.astype(form) if isinstance(form, str) else quantize_matrix(weight, Codes(*form))
    values = weight if isinstance(form, str) else weight.dequantize()
    x = jax.random.normal(jax.random.key(1), (shape[1], columns))
    got = jax.jit(lambda *arguments: plain_matmul(*arguments))(weight, x)  # another function, to be traced anew
    assert got.dtype == jnp.float32
    expected = np.asarray(values, np.float64) @ np.asarray(x, np.float64)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def rounded_columns(x):
    """Columns as w8a8 rounds them, in float64, and the step of each."""
    largest = np.abs(x).max(axis=0)
    steps = largest / np.float32(127)
    return np.round(x * (np.float32(127) / largest)).astype(np.float64) * steps, steps


@pytest.mark.parametrize("columns", [1, 5, 40])
def test_columns_are_rounded_to_8_bits_where_a_matrix_asks_for_it(columns):
    weight = quantize_matrix(jax.random.normal(jax.random.key(0), (60, 200)), Codes(8, None, 8))
    x = np.array(jax.random.normal(jax.random.key(1), (200, columns)))
    x[:, 0] *= 1e4
    rounded, steps = rounded_columns(x)
    expected = np.asarray(weight.dequantize(), np.float64) @ rounded
    got = np.asarray(jax.jit(lambda *arguments: plain_matmul(*arguments))(weight, x))
    np.testing.assert_allclose(got / steps, expected / steps, atol=2e-3)  # less than any other rounding would change
    exact = np.asarray(weight.dequantize(), np.float64) @ x
    assert (np.abs(got - exact).max(axis=0) > 0.1 * steps).all()


def test_the_derivative_of_rounded_columns_is_that_of_the_columns():
    weight = quantize_matrix(jax.random.normal(jax.random.key(0), (60, 50)), Codes(8, None, 8))
    x = jax.random.normal(jax.random.key(1), (50, 3))
    got = jax.grad(lambda x: matmul(weight, x)[7, 1])(x)
    np.testing.assert_allclose(got[:, 1], weight.dequantize()[7], rtol=1e-5, atol=1e-6)
    assert not np.any(got[:, [0, 2]])


@pytest.mark.parametrize("form", ["float32", "bfloat16", (8, None), (8, 32), (4, 32)])
def test_rows_are_taken_in_float32(form):
    weight = jax.random.normal(jax.random.key(0), (6, 70))
    weight = weight.astype(form) if isinstance(form, str) else quantize_matrix(weight, Codes(*form))
    whole = weight.astype(jnp.float32) if isinstance(form, str) else weight.dequantize()
    ids = np.array([[5, 0, 0], [2, 1, 9]])  # 9 takes the last row
    got = jax.jit(take_rows)(weight, ids)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.asarray(whole)[np.minimum(ids, 5)])
