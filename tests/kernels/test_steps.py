"""With native kernels and float32 weights a decode step's logits are the same bits in every batch."""

import numpy as np
import pytest
from cache_cases import make_config
from tiny import random_params

import llorch_jax as lj
from llorch_jax import kernels

CONFIG = make_config(layers=2, heads=12, head_dim=64)  # GPT-2's width: XLA's own sums depend on the batch there
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (16, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def steps(params, rows):
    """Logits after feeding the tokens of some rows one by one."""
    cache = lj.make_cache(CONFIG, "paged:4", batch_size=len(rows), capacity=16)
    for column in range(TOKENS.shape[1]):
        logits, cache = lj.decode_step(params, CONFIG, TOKENS[rows, column], cache)
    return np.asarray(logits)


@pytest.mark.skipif(kernels.describe().isa is None, reason="the kernels were not built")
def test_a_rows_logits_are_the_same_bits_alone_and_in_any_batch(params):
    alone = np.concatenate([steps(params, [row]) for row in range(4)])
    for count in (2, 5, 8, 16):
        np.testing.assert_array_equal(steps(params, list(range(count)))[:4], alone[:count])
    np.testing.assert_array_equal(steps(params, [7, 3, 11, 0, 9, 2])[[3, 5, 1]], alone[[0, 2, 3]])
