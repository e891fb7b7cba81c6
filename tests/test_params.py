"""Parameters: shapes, counts, and how they are initialised."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.params import nbytes

init_params = jax.jit(lj.init_params, static_argnums=(0, 2))
SMALL = {"vocab_size": 101, "n_positions": 20, "n_embd": 24, "n_layer": 3, "n_head": 4}
VARIANTS = [
    {},
    {"num_kv_heads": 1},
    {"num_kv_heads": 2},
    {"n_inner": 10},
    {"tie_word_embeddings": False},
    {"kv_sharing": (0, 0, 2)},
]


def test_gpt2_small_has_as_many_as_published():
    shapes = lj.param_shapes(lj.GPT2Config())
    assert lj.count_params(shapes) == 124_439_808
    assert nbytes(shapes) == 4 * 124_439_808
    assert nbytes(lj.param_shapes(lj.GPT2Config(), jnp.bfloat16)) == 2 * 124_439_808


def test_shapes_allocate_nothing():
    shapes = lj.param_shapes(lj.GPT2Config(n_embd=2**20, n_head=1, n_layer=2))  # four million million parameters
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("changes", "dtype"), [*((changes, "float32") for changes in VARIANTS), ({}, "bfloat16")], ids=str
)
def test_initial_parameters_have_the_shapes_foretold(changes, dtype):
    config = lj.GPT2Config(**SMALL, **changes)
    params = init_params(config, jax.random.key(0), jnp.dtype(dtype))
    shapes = lj.param_shapes(config, jnp.dtype(dtype))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    assert lj.count_params(params) == lj.count_params(shapes)
    assert nbytes(params) == nbytes(shapes) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_dense_weights_are_output_major():
    shapes = lj.param_shapes(lj.GPT2Config(**SMALL, num_kv_heads=2, n_inner=10))
    block = shapes.blocks[0]
    assert shapes.wte.shape == (101, 24)
    assert shapes.wpe.shape == (20, 24)
    assert (block.qkv.weight.shape, block.qkv.bias.shape) == (((4 + 2 * 2) * 6, 24), (48,))
    assert (block.attn_proj.weight.shape, block.attn_proj.bias.shape) == ((24, 24), (24,))
    assert (block.fc.weight.shape, block.fc.bias.shape) == ((10, 24), (10,))
    assert (block.mlp_proj.weight.shape, block.mlp_proj.bias.shape) == ((24, 10), (24,))
    assert {norm.weight.shape for norm in (block.ln_1, block.ln_2, shapes.ln_f)} == {(24,)}
    assert len(shapes.blocks) == 3


def test_output_projection():
    tied = init_params(lj.GPT2Config(**SMALL), jax.random.key(0))
    assert tied.lm_head is None
    assert tied.output_projection is tied.wte
    untied = init_params(lj.GPT2Config(**SMALL, tie_word_embeddings=False), jax.random.key(0))
    assert untied.output_projection is untied.lm_head
    assert not np.array_equal(untied.lm_head, untied.wte)
    assert lj.count_params(untied) == lj.count_params(tied) + 101 * 24


def test_initial_values_are_those_of_gpt_2():
    config = lj.GPT2Config(vocab_size=500, n_positions=300, n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=False)
    params = init_params(config, jax.random.key(1))
    into_residual = 0.02 / (2 * 2) ** 0.5
    normal = {"wte": params.wte, "wpe": params.wpe, "lm_head": params.lm_head}
    for number, block in enumerate(params.blocks):
        normal |= {f"qkv {number}": block.qkv.weight, f"fc {number}": block.fc.weight}
        for dense in (block.attn_proj, block.mlp_proj):
            assert abs(np.std(dense.weight) / into_residual - 1) < 0.05
        for dense in (block.qkv, block.attn_proj, block.fc, block.mlp_proj):
            assert not np.any(dense.bias)
        for norm in (block.ln_1, block.ln_2):
            assert np.all(norm.weight == 1)
            assert not np.any(norm.bias)
    for name, weight in normal.items():
        assert abs(np.std(weight) / 0.02 - 1) < 0.05, name
        assert abs(np.mean(weight)) < 0.001, name


def test_no_two_matrices_are_alike_and_a_key_gives_the_same_again():
    config = lj.GPT2Config(**SMALL, tie_word_embeddings=False)
    params = init_params(config, jax.random.key(0))
    firsts = [float(leaf[0, 0]) for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    assert len(set(firsts)) == len(firsts)
    again, other = (init_params(config, jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(again.wte, params.wte)
    assert not np.array_equal(other.wte, params.wte)


def test_shapes_of_a_thousand_blocks_are_those_of_one_repeated():
    config = lj.GPT2Config(**{**SMALL, "n_layer": 1000}, kv_sharing=(0,) * 1000)
    start = time.perf_counter()
    shapes = lj.param_shapes(config)
    assert time.perf_counter() - start < 5  # a second per hundred blocks, when each was traced
    assert len(shapes.blocks) == 1000
    assert shapes.blocks[999] == lj.param_shapes(lj.GPT2Config(**{**SMALL, "n_layer": 1})).blocks[0]
