"""The native summary of logits compared with float64 and with its twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from twins import twins

from llorch_jax.kernels import describe
from llorch_jax.kernels.logits import logsumexp, most_likely

pytestmark = pytest.mark.skipif(describe().isa is None, reason=f"no native kernels: {describe().reason}")


def both(logits):
    return most_likely(logits), logsumexp(logits)


def make(rows, columns, seed=0, scale=5.0):
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)


def expected(logits):
    logits = np.asarray(logits, np.float64)
    most = logits.max(1)
    return np.log(np.exp(logits - most[:, None]).sum(1)) + most


def test_both_results_come_from_one_call():
    text = jax.jit(both).lower(make(2, 300)).compile().as_text()
    assert text.count('custom_call_target="llorch_summarize"') == 1


@examples(20)
@given(
    rows=st.sampled_from([1, 2, 5]),
    columns=st.integers(1, 70) | st.sampled_from([1023, 1024, 1025, 5000]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_equals_float64_and_a_row_has_the_same_bits_in_any_company(rows, columns, scale, seed):
    logits = make(rows, columns, seed, scale).round(1)  # equal ones too
    ids, totals = jax.jit(both)(logits)
    np.testing.assert_array_equal(ids, logits.argmax(1))
    np.testing.assert_allclose(totals, expected(logits), rtol=1e-6, atol=1e-6)
    alone = jax.jit(both)(logits[-1:])
    assert (alone[0][0], alone[1][0]) == (ids[-1], totals[-1])


def test_long_rows_are_summed_without_loss():
    logits = make(2, 50257, scale=0.01)
    np.testing.assert_allclose(jax.jit(logsumexp)(logits), expected(logits), rtol=2e-7)


@pytest.mark.parametrize("columns", [5, 40, 2000])
def test_what_is_not_finite_gives_what_the_twin_gives(columns):
    logits = make(7, columns)
    logits[0, 3] = np.nan
    logits[1, 4] = np.inf
    logits[2] = -np.inf
    logits[3, 1:] = -np.inf
    logits[4, [2, 4]] = np.nan, np.inf
    logits[5, 0] = 3e38
    ids, totals = jax.jit(both)(logits)
    with twins():
        plain_ids, plain = jax.jit(lambda x: both(x))(logits)
    np.testing.assert_array_equal(np.asarray(ids)[[1, 2, 3, 5, 6]], np.asarray(plain_ids)[[1, 2, 3, 5, 6]])
    np.testing.assert_allclose(totals, plain, rtol=1e-6)
    assert np.isnan(totals[np.array([0, 4])]).all()


def test_derivatives_and_vmap_are_those_of_the_twin():
    logits = make(3, 40)
    got = jax.grad(lambda x: logsumexp(x).sum())(logits)
    np.testing.assert_allclose(got, jax.nn.softmax(logits), atol=1e-6)
    ids, totals = jax.vmap(both)(np.stack([logits, -logits]))
    np.testing.assert_array_equal(ids[1], logits.argmin(1))
    np.testing.assert_allclose(totals[1], expected(-logits), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "x", "ids", "totals"),
    [("x", (8,), (8,), (8,)), ("x", (8, 0), (8,), (8,)), ("ids", (8, 2), (7,), (8,)), ("totals", (8, 2), (8,), (8, 1))],
)
def test_a_wrong_call_names_the_argument(name, x, ids, totals):
    shapes = jax.ShapeDtypeStruct(ids, jnp.int32), jax.ShapeDtypeStruct(totals, jnp.float32)
    call = jax.ffi.ffi_call("llorch_summarize", shapes)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"llorch_summarize: {name}: expected"):
        jax.block_until_ready(call(jnp.zeros(x, jnp.float32)))
