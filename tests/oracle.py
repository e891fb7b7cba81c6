"""GPT-2 in plain NumPy: exact in float64; in float32 it shows how far rounding alone takes logits."""

from typing import Any

import numpy as np

from llorch_jax.config import GPT2Config
from llorch_jax.params import Params


def gelu(x: np.ndarray) -> np.ndarray:
    """GPT-2's activation, the approximation by tanh."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _norm(params: Any, x: np.ndarray, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * np.asarray(params.weight, x.dtype) + np.asarray(params.bias, x.dtype)


def _dense(params: Any, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(params.weight, x.dtype).T + np.asarray(params.bias, x.dtype)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray, scale: float) -> np.ndarray:
    """q [T, N, H], k and v [T, K, H], allowed [T, T] -> [T, N * H]."""
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        scores = np.where(allowed, q[:, head] @ k[:, group].T * scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
    return out.reshape(len(q), -1)


def logits(params: Params, config: GPT2Config, row: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """Logits [T, V] of one row of tokens, computed in `dtype` throughout."""
    count = len(row)
    x = np.asarray(params.wte, dtype)[row] + np.asarray(params.wpe, dtype)[:count]
    query, slot = np.arange(count)[:, None], np.arange(count)[None]
    allowed = (slot <= query) & (slot > query - (config.sliding_window or count))
    owned = {}
    for layer, block in enumerate(params.blocks):
        qkv = _dense(block.qkv, _norm(block.ln_1, x, config.layer_norm_epsilon))
        qkv = qkv.reshape(count, config.kv_heads, -1, config.head_dim)  # rows go by key/value head
        q = qkv[:, :, :-2].reshape(count, config.n_head, config.head_dim)
        owned[layer] = qkv[:, :, -2], qkv[:, :, -1]
        k, v = owned[config.kv_sharing[layer] if config.kv_sharing else layer]
        x = x + _dense(block.attn_proj, _attend(q, k, v, allowed, float(config.attention_scale(layer))))
        x = x + _dense(block.mlp_proj, gelu(_dense(block.fc, _norm(block.ln_2, x, config.layer_norm_epsilon))))
    out = _norm(params.ln_f, x, config.layer_norm_epsilon) @ np.asarray(params.output_projection, dtype).T
    assert out.dtype == dtype
    return out


def noise(params: Params, config: GPT2Config, rows: int = 12, columns: int = 24) -> float:
    """The largest error of float32 logits, relative to the root mean square of the right ones, over random tokens."""
    worst = 0.0
    for row in np.random.default_rng(0).integers(0, config.vocab_size, (rows, columns)):
        exact = logits(params, config, row)
        error = np.abs(logits(params, config, row, np.float32) - exact).max()
        worst = max(worst, float(error / np.sqrt(np.square(exact).mean())))
    return worst
