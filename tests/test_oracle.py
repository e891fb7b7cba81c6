"""The model and every lossless cache against GPT-2 in plain NumPy and float64, over random configurations."""

import math

import jax.numpy as jnp
import numpy as np
from cache_cases import any_configs, assert_close, feed, in_chunks, make_batch, make_params, uncached
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax import model
from llorch_jax.cache.layouts import make_cache
from llorch_jax.config import ACTIVATIONS


def norm(params, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * np.asarray(params.weight, np.float64) + np.asarray(params.bias, np.float64)


def dense(params, x):
    return x @ np.asarray(params.weight, np.float64).T + np.asarray(params.bias, np.float64)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def oracle(params, config, row):
    """Logits float64 [T, V] of one row of tokens."""
    count, heads, kv_heads, width = len(row), config.n_head, config.kv_heads, config.head_dim
    x = np.asarray(params.wte, np.float64)[row] + np.asarray(params.wpe, np.float64)[:count]
    query, slot = np.arange(count)[:, None], np.arange(count)[None]
    allowed = (slot <= query) & (slot > query - (config.sliding_window or count))
    owned = {}
    for layer, block in enumerate(params.blocks):
        qkv = dense(block.qkv, norm(block.ln_1, x, config.layer_norm_epsilon)).reshape(count, kv_heads, -1, width)
        owned[layer] = qkv[:, :, -2], qkv[:, :, -1]
        q = qkv[:, :, :-2].reshape(count, heads, width)
        k, v = owned[config.kv_sharing[layer] if config.kv_sharing else layer]
        out = np.zeros((count, heads, width))
        for head in range(heads):
            group = head * kv_heads // heads
            scores = np.where(allowed, q[:, head] @ k[:, group].T * config.attention_scale(layer), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        x = x + dense(block.attn_proj, out.reshape(count, -1))
        x = x + dense(block.mlp_proj, gelu(dense(block.fc, norm(block.ln_2, x, config.layer_norm_epsilon))))
    return norm(params.ln_f, x, config.layer_norm_epsilon) @ np.asarray(params.output_projection, np.float64).T


@examples(5)
@given(config=any_configs(), spec=st.sampled_from(["static", "dynamic", "paged:4", "rotating:14+3", "h2o:20"]))
def test_any_model_with_any_lossless_cache(config, spec):
    batch = make_batch([16, 7], seed=3)
    plain = uncached(config, batch)
    _, cache = feed(config, make_cache(config, spec, batch_size=2), batch, in_chunks([13, 4], 16))
    cached, _ = feed(config, cache, batch, in_chunks([3, 3], 1), start=[13, 4])
    for row, length in enumerate(batch.lengths):
        expected = oracle(make_params(config), config, batch.tokens[row, :length])
        assert_close(plain[row, :length], expected, tolerance=1e-4)  # narrow models are ill-conditioned
        assert_close(cached[row, length - 3 : length], expected[-3:], tolerance=1e-4)


FORMULAS = {
    "gelu_new": gelu,
    "gelu_pytorch_tanh": gelu,
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
