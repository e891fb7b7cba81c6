"""Stored layouts: families, names and shapes, and the way of each tensor between file and parameters."""

import jax
import numpy as np
import pytest
import synth

from llorch_jax.config import GPT2Config
from llorch_jax.loading.hf_format import StoredTensor, family_of, hf_fields, stored_tensors
from llorch_jax.params import param_shapes

TINY = {"vocab_size": 11, "n_positions": 7, "n_embd": 24, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "gpt2"),
        ({"num_kv_heads": 4}, "gpt2"),
        ({"n_head": 1, "num_kv_heads": 1}, "gpt2"),
        ({"scale_attn_by_inverse_layer_idx": True}, "gpt2"),
        ({"num_kv_heads": 1}, "gpt_bigcode"),
        # transformers' gpt_bigcode would ignore the scaling, its gpt2 the window
        ({"num_kv_heads": 1, "scale_attn_by_inverse_layer_idx": True}, "llorch_gpt2"),
        ({"num_kv_heads": 2}, "llorch_gpt2"),
        ({"sliding_window": 3}, "llorch_gpt2"),
        ({"kv_sharing": (0, 0)}, "llorch_gpt2"),
        ({"kv_sharing": (0, 1)}, "gpt2"),
        ({"num_kv_heads": 1, "sliding_window": 3}, "llorch_gpt2"),
    ],
)
def test_family_and_fields_describe_the_same_model(fields, family):
    config = GPT2Config(**{**TINY, **fields})
    assert family_of(config) == family
    again = GPT2Config.from_hf_dict(hf_fields(config, family, "float32"))
    assert again.kv_heads == config.kv_heads
    assert param_shapes(again) == param_shapes(config)
    assert again.sliding_window == config.sliding_window
    assert again.cache_layers == config.cache_layers
    assert again.scale_attn_by_inverse_layer_idx == config.scale_attn_by_inverse_layer_idx


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "gpt2"},
        {"model_type": "gpt2", "tie_word_embeddings": False, "n_inner": 50},
        {"model_type": "gpt_bigcode"},
        {"model_type": "gpt_bigcode", "multi_query": False},
    ],
)
def test_names_and_shapes_are_those_of_the_generator(fields):
    fields = {**TINY, **fields}
    tensors = jax.tree.leaves(stored_tensors(GPT2Config.from_hf_dict(fields), fields["model_type"]))
    expected = {name: shape for name, shape, _, _ in synth.layout(fields)}
    assert {tensor.name: tensor.shape for tensor in tensors} == expected


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "llorch_gpt2"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_params_have_their_own_shapes(family, kv_heads):
    config = GPT2Config(**TINY, num_kv_heads=kv_heads)
    tensors = stored_tensors(config, family)
    shapes = jax.tree.map(lambda tensor: tensor.to_param(np.zeros(tensor.shape)).shape, tensors)
    assert shapes == jax.tree.map(lambda shape: shape.shape, param_shapes(config))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [1, 2, 3])
def test_from_param_inverts_to_param(transposed, interleaved):
    shape = (5, 18) if transposed else (18, 5)
    tensor = StoredTensor("w", shape, transposed, interleaved)
    stored = np.arange(90).reshape(shape)
    np.testing.assert_array_equal(tensor.from_param(tensor.to_param(stored)), stored)


def test_interleaved_rows_are_sorted_by_kind():
    rows = [f"{kind}{head}{row}" for head in range(2) for kind in "qkv" for row in range(3)]
    sorted_rows = StoredTensor("b", (18,), interleaved=2).to_param(np.array(rows))
    assert sorted_rows.tolist() == [f"{kind}{head}{row}" for kind in "qkv" for head in range(2) for row in range(3)]
