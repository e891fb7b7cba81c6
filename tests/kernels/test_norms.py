"""Native layer norm compared with float64 and with its twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from twins import twins

from llorch_jax.kernels import describe
from llorch_jax.linear import Norm, layer_norm

pytestmark = pytest.mark.skipif(describe().isa is None, reason=f"no native kernels: {describe().reason}")

EPSILON = 1e-5
norm = jax.jit(layer_norm, static_argnums=2)


def make(depth, columns, seed=0):
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((2, depth), dtype=np.float32)
    return Norm(weight, bias), rng.standard_normal((depth, columns), dtype=np.float32) * 3 + 1


def expected(params, x):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(0)
    return centred / np.sqrt(np.square(centred).mean(0) + EPSILON) * params.weight[:, None] + params.bias[:, None]


def test_it_is_native():
    assert "llorch_layer_norm" in norm.lower(*make(8, 2), EPSILON).as_text()


@examples(15)
@given(depth=st.integers(1, 70), columns=st.sampled_from([1, 2, 5, 8, 16, 17, 33, 80]), seed=st.integers(0, 2**32 - 1))
def test_it_equals_float64_and_a_column_has_the_same_bits_in_any_company(depth, columns, seed):
    params, x = make(depth, columns, seed)
    result = np.asarray(norm(params, x, EPSILON))
    np.testing.assert_allclose(result, expected(params, x), rtol=1e-5, atol=2e-5)
    column = seed % columns
    assert np.array_equal(norm(params, x[:, column : column + 1], EPSILON)[:, 0], result[:, column])


def test_a_column_that_is_not_finite_stays_alone():
    params, x = make(40, 18)
    x[3, 2], x[5, 17] = np.nan, np.inf
    result = np.asarray(norm(params, x, EPSILON))
    bad = [2, 17]
    assert np.isnan(result[:, bad]).all()
    good = np.delete(x, bad, axis=1)
    np.testing.assert_allclose(np.delete(result, bad, axis=1), expected(params, good), rtol=1e-5, atol=2e-5)


def test_large_constant_columns_are_normalized_to_the_bias():
    params, x = make(64, 3)
    x[:] = [0.0, 1e6, -3e4]
    np.testing.assert_allclose(norm(params, x, EPSILON), np.broadcast_to(params.bias[:, None], x.shape), atol=1e-5)


def test_derivatives_and_vmap_are_those_of_the_twin():
    params, x = make(24, 3)

    def squares(params, x):
        return jnp.sum(jnp.square(layer_norm(params, x, EPSILON)))

    native = jax.grad(squares, (0, 1))(params, x)
    mapped = jax.vmap(lambda x: layer_norm(params, x, EPSILON))(np.stack([x, x + 1]))
    with twins():
        plain = jax.grad(squares, (0, 1))(params, x)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), native, plain)
    np.testing.assert_allclose(mapped[1], expected(params, x + 1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("x", ((8,), (8,), (8,))), ("weight", ((8, 2), (7,), (8,))), ("bias", ((8, 2), (8,), (8, 1)))],
)
def test_a_wrong_call_names_the_argument(name, shapes):
    call = jax.ffi.ffi_call("llorch_layer_norm", jax.ShapeDtypeStruct((8, 2), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"llorch_layer_norm: {name}: expected"):
        jax.block_until_ready(call(*(jnp.zeros(shape, jnp.float32) for shape in shapes), epsilon=np.float32(1e-5)))
