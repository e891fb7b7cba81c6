"""The model and every lossless cache against GPT-2 in plain NumPy and float64, over random configurations."""

import math

import jax.numpy as jnp
import numpy as np
import oracle
from cache_cases import any_configs, assert_close, feed, in_chunks, make_batch, make_params, rms, uncached
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax import model
from llorch_jax.cache.layouts import make_cache
from llorch_jax.config import ACTIVATIONS


@examples(5)
@given(config=any_configs(), spec=st.sampled_from(["static", "dynamic", "paged:4", "rotating:14+3", "h2o:20"]))
def test_any_model_with_any_lossless_cache(config, spec):
    params, batch = make_params(config), make_batch([16, 7], seed=3)
    tolerance = 4 * oracle.noise(params, config)  # much larger in narrow models, whose norms are ill-conditioned
    plain = uncached(config, batch)
    _, cache = feed(config, make_cache(config, spec, batch_size=2), batch, in_chunks([13, 4], 16))
    cached, _ = feed(config, cache, batch, in_chunks([3, 3], 1), start=[13, 4])
    for row, length in enumerate(batch.lengths):
        expected = oracle.logits(params, config, batch.tokens[row, :length])
        assert_close(plain[row, :length], expected, tolerance)
        assert_close(cached[row, length - 3 : length], expected[-3:], tolerance, scale=rms(expected))


FORMULAS = {
    "gelu_new": oracle.gelu,
    "gelu_pytorch_tanh": oracle.gelu,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def test_activations_are_their_formulas():
    assert set(FORMULAS) == set(ACTIVATIONS)
    x = np.linspace(-6, 6, 49)
    for name, formula in FORMULAS.items():
        given = model._ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(given, formula(x), atol=2e-6, err_msg=name)
