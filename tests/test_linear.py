"""Products and look-ups of rows with float and quantized matrices, compared with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax.linear import matmul


@examples(8)
@given(rows=st.integers(1, 9), width=st.integers(1, 9), columns=st.integers(1, 3), half=st.booleans())
def test_products_equal_numpy(rows, width, columns, half):
    weight = jax.random.normal(jax.random.key(rows), (rows, width), jnp.bfloat16 if half else jnp.float32)
    x = jax.random.normal(jax.random.key(width), (width, columns))
    got = jax.jit(matmul)(weight, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(weight, np.float64) @ np.asarray(x, np.float64), atol=5e-6)
