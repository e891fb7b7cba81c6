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
@pytest.mark.parametrize("heads", [(), (1, 0), (2, 0, 1), (0, 3, 5, 1, 2, 4)])
def test_from_param_inverts_to_param(transposed, heads):
    shape = (5, 18) if transposed else (18, 5)
    tensor = StoredTensor("w", shape, transposed, heads)
    stored = np.arange(90).reshape(shape)
    np.testing.assert_array_equal(tensor.from_param(tensor.to_param(stored)), stored)


@pytest.mark.parametrize("field", ["weight", "bias"])
@pytest.mark.parametrize(
    ("kv_heads", "expected"),
    [
        (4, ["q0", "k0", "v0", "q1", "k1", "v1", "q2", "k2", "v2", "q3", "k3", "v3"]),
        (2, ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]),
        (1, ["q0", "q1", "q2", "q3", "k0", "v0"]),
    ],
)
def test_rows_of_queries_keys_and_values_are_ordered_by_key_value_head(field, kv_heads, expected):
    config = GPT2Config(**TINY, num_kv_heads=kv_heads)
    tensor = getattr(stored_tensors(config, "llorch_gpt2").blocks[0].qkv, field)
    heads = [f"{kind}{head}" for kind, count in (("q", 4), ("k", kv_heads), ("v", kv_heads)) for head in range(count)]
    stored = np.broadcast_to(np.repeat(heads, config.head_dim), tensor.shape)
    rows = tensor.to_param(stored).reshape(len(expected), config.head_dim, -1)
    np.testing.assert_array_equal(rows, np.broadcast_to(np.array(expected)[:, None, None], rows.shape))


def test_gpt_bigcode_stores_them_in_that_order():
    for kv_heads in (1, 4):
        qkv = stored_tensors(GPT2Config(**TINY, num_kv_heads=kv_heads), "gpt_bigcode").blocks[0].qkv
        assert qkv.weight.heads == qkv.bias.heads == ()
