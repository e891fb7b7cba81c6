"""Compiled steps written by `jax.export` and read back: parameters, caches and samplers as they go in and out."""

from functools import partial

import jax
import numpy as np
import pytest
import tiny
from cache_cases import assert_close
from jax import export

import llorch_jax as lj
from llorch_jax.cache.layouts import LAYOUTS
from llorch_jax.decoding import steps
from llorch_jax.decoding.request import prepare

CONFIG = tiny.CONFIG
PARAMS = tiny.random_params(CONFIG)
PROMPT = np.arange(10, dtype=np.int32).reshape(2, 5)
lj.register_exports()
SIZES = {"rotating": ":8+2", "recent": ":8", "sinks": ":8", "h2o": ":8", "snapkv": ":8"}
SAMPLERS = {
    "greedy": lj.Greedy(),
    "sampling": lj.Sampling.create(temperature=0.7, top_k=5, repetition_penalty=1.2),
    "mirostat": lj.Mirostat.create(),
}


def read_back(function, *arguments):
    """The function for such arguments, after it was written and read."""
    return export.deserialize(export.export(jax.jit(function))(*arguments).serialize())


def unchanged(tree):
    return tree


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cache_can_be_an_argument_and_a_result(layout, codec):
    settings = {} if layout in ("int8", "int4") else {"codec": codec}
    cache = lj.make_cache(CONFIG, layout + SIZES.get(layout, ""), batch_size=2, **settings)
    again = read_back(unchanged, cache)
    assert again.in_tree == jax.tree.structure(((cache,), {}))
    assert again.out_tree == jax.tree.structure(cache)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_all_parameters_can_be_an_argument(weights):
    params = lj.quantize(PARAMS, weights)
    assert read_back(unchanged, params).out_tree == jax.tree.structure(params)


@pytest.mark.parametrize(("layout", "weights"), [("static", "float32"), ("paged:8", "float32"), ("int8", "int4")])
def test_a_decode_step_gives_the_same_logits(layout, weights):
    params = lj.quantize(PARAMS, weights)
    _, cache = lj.prefill(params, CONFIG, PROMPT, lj.make_cache(CONFIG, layout, batch_size=2))
    cache = cache.reserve(1)
    token = np.array([3, 4], np.int32)

    def step(params, token, cache):
        return steps.decode(params, CONFIG, token, cache)

    logits, after = read_back(step, params, token, cache).call(params, token, cache)
    expected, cache = lj.decode_step(params, CONFIG, token, cache)
    # An exported program has no native kernels in it, and another last digit may tip over a code of the cache.
    assert_close(logits, expected, None if cache.codec.lossless and weights == "float32" else 0.02)
    assert type(after) is type(cache)
    np.testing.assert_array_equal(after.lengths, cache.lengths)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_the_loop_draws_the_same_tokens(sampler):
    request = prepare(CONFIG, PROMPT, 4, sampler=SAMPLERS[sampler], key=jax.random.key(1))
    state = steps.start(PARAMS, CONFIG, request)
    step = partial(steps.next_state, config=CONFIG)

    def run(params, decoding, state):
        return step(params, decoding=decoding, state=state)

    after = read_back(run, PARAMS, request.decoding, state).call(PARAMS, request.decoding, state)
    expected = jax.jit(run)(PARAMS, request.decoding, state)
    np.testing.assert_array_equal(after.token, expected.token)
    assert jax.tree.structure(after) == jax.tree.structure(expected)


def test_registering_twice_changes_nothing():
    lj.register_exports()


def test_a_custom_function_as_a_policy_is_refused():
    policy = lambda scores: scores  # noqa: E731
    cache = lj.make_cache(CONFIG, "recent:8", batch_size=1).replace(policy=policy)
    exported = export.export(jax.jit(unchanged))(cache)
    with pytest.raises(lj.ExportError, match=r"expected .* to save as EvictingCache\.policy, got"):
        exported.serialize()
