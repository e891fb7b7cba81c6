"""Fidelity: the numbers that plain NumPy finds, nothing lost with an exact cache, something with a lossy one."""

import math

import numpy as np
import pytest
from cache_cases import make_batch, make_config, make_params
from scipy.special import log_softmax

import llorch_jax as lj
from llorch_jax.cache import make_cache
from llorch_jax.errors import NonFiniteError
from llorch_jax.evaluation.fidelity import fidelity

CONFIG = make_config(layers=2, heads=2, head_dim=8)
TOKENS = make_batch([24, 24]).tokens


def test_an_exact_cache_loses_nothing():
    found = fidelity(make_params(CONFIG), CONFIG, TOKENS, 16, make_cache(CONFIG, "dynamic", batch_size=2))
    logits = np.asarray(lj.forward(make_params(CONFIG), CONFIG, TOKENS), np.float64)[:, 16:23]
    loss = -np.take_along_axis(log_softmax(logits, -1), TOKENS[:, 17:, None], axis=-1).mean()
    assert found.exact_perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.perplexity == pytest.approx(found.exact_perplexity, rel=1e-5)
    assert (found.agreement, found.tokens) == (1.0, 14)
    assert found.kl < 1e-6
    assert found.bytes == make_cache(CONFIG, "dynamic", batch_size=2, initial=24).memory_usage()


def test_a_smaller_budget_costs_more():
    by_budget = [
        fidelity(make_params(CONFIG), CONFIG, TOKENS, 16, make_cache(CONFIG, f"recent:{budget}", batch_size=2, slack=1))
        for budget in (4, 14)
    ]
    assert by_budget[0].kl > by_budget[1].kl > 1e-4
    assert by_budget[0].exact_perplexity == by_budget[1].exact_perplexity != by_budget[0].perplexity
    assert by_budget[0].bytes < by_budget[1].bytes


def test_divergence_is_that_of_the_two_distributions():
    found = fidelity(make_params(CONFIG), CONFIG, TOKENS[:1, :18], 16, make_cache(CONFIG, "recent:4", slack=1))
    exact = log_softmax(np.asarray(lj.forward(make_params(CONFIG), CONFIG, TOKENS[:1, :17]), np.float64)[0, -1])
    cache = lj.prefill(make_params(CONFIG), CONFIG, TOKENS[:1, :16], make_cache(CONFIG, "recent:4", slack=1))[1]
    other = log_softmax(
        np.asarray(lj.decode_step(make_params(CONFIG), CONFIG, TOKENS[:1, 16], cache)[0], np.float64)[0]
    )
    assert found.kl == pytest.approx(float(np.sum(np.exp(exact) * (exact - other))), rel=1e-3)
    assert found.tokens == 1


def test_logits_that_are_not_finite_are_an_error():
    broken = make_params(CONFIG)
    broken = broken.replace(ln_f=broken.ln_f.replace(weight=broken.ln_f.weight * np.nan))
    with pytest.raises(NonFiniteError, match="check the weights"):
        fidelity(broken, CONFIG, TOKENS, 16, make_cache(CONFIG, "dynamic", batch_size=2))


@pytest.mark.parametrize("prompt", [0, 23, 2.0])
def test_bad_prompts(prompt):
    with pytest.raises(lj.TokenError, match=r"prompt: expected a whole number in 1 \.\. 22"):
        fidelity(make_params(CONFIG), CONFIG, TOKENS, prompt, make_cache(CONFIG, batch_size=2))


def test_a_cache_that_holds_tokens():
    _, cache = lj.forward(make_params(CONFIG), CONFIG, TOKENS[:, :3], make_cache(CONFIG, batch_size=2))
    with pytest.raises(lj.CacheError, match="cache: expected an empty one"):
        fidelity(make_params(CONFIG), CONFIG, TOKENS, 16, cache)
