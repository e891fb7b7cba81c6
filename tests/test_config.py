"""GPT2Config: defaults, presets, the translation of Hugging Face's fields, and errors that name the field."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_jax.config import ACTIVATIONS, GPT2Config
from llorch_jax.errors import ConfigError
from llorch_jax.params import count_params, param_shapes

CONFIGS = Path(__file__).parents[1] / "configs"

# What the hub's repositories openai-community/gpt2-medium and distilbert/distilgpt2 have in config.json.
HUB_MEDIUM = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 1024,
    "n_head": 16,
    "n_layer": 24,
    "n_positions": 1024,
    "n_special": 0,
    "predict_special_tokens": True,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
HUB_DISTIL = {
    **{name: value for name, value in HUB_MEDIUM.items() if name not in ("n_special", "predict_special_tokens")},
    "_num_labels": 1,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 6,
}
# What transformers 5 writes for a gpt_bigcode model.
BIGCODE = {
    "activation_function": "gelu_pytorch_tanh",
    "add_cross_attention": False,
    "architectures": ["GPTBigCodeForCausalLM"],
    "attention_softmax_in_fp32": True,
    "dtype": "float32",
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 48,
    "n_head": 4,
    "n_inner": None,
    "n_layer": 2,
    "n_positions": 64,
    "num_key_value_heads": 1,
    "pad_token_id": None,
    "scale_attention_softmax_in_fp32": True,
    "transformers_version": "5.24.0",
    "use_cache": True,
    "vocab_size": 97,
}


def test_defaults_are_gpt2_small():
    config = GPT2Config()
    assert (config.kv_heads, config.head_dim, config.inner_dim) == (12, 64, 3072)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("distilgpt2", 81.9), ("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)],
)
def test_presets_have_the_published_sizes(name, millions):
    config = GPT2Config.from_preset(name)
    assert round(count_params(param_shapes(config)) / 1e6, 1) == millions
    assert config.eos_token_id == 50256


def test_every_file_in_configs_is_a_preset():
    for path in CONFIGS.glob("*.toml"):
        fields = tomllib.loads(path.read_text())["model"]
        assert GPT2Config.from_preset(path.stem) == GPT2Config.from_hf_dict(fields)


def test_an_unknown_preset_is_an_error():
    with pytest.raises(ConfigError, match=r"preset: expected one of distilgpt2, gpt2, .*; got 'gpt3'"):
        GPT2Config.from_preset("gpt3")


def test_configs_are_hashable_values():
    one, same, other = GPT2Config(n_layer=2), GPT2Config(n_layer=2), GPT2Config(n_layer=3)
    assert one == same
    assert hash(one) == hash(same)
    assert len({one, same, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.n_layer = 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (name, value)
            for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
            for value in (0, None)
        ),
        *((name, value) for name in ("num_kv_heads", "n_inner", "sliding_window") for value in (0, -1, 2.0, "4")),
        ("vocab_size", True),
        ("n_layer", "12"),
        ("n_head", 7),
        ("num_kv_heads", 5),
        ("num_kv_heads", 24),
        ("activation_function", "mish"),
        ("activation_function", None),
        ("layer_norm_epsilon", 0),
        ("layer_norm_epsilon", -1e-5),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", "1e-5"),
        ("layer_norm_epsilon", True),
        ("scale_attn_weights", 1),
        ("scale_attn_by_inverse_layer_idx", None),
        ("reorder_and_upcast_attn", "false"),
        ("tie_word_embeddings", 0),
        ("kv_sharing", (0,)),
        ("kv_sharing", [*range(12), 0]),
        ("kv_sharing", "000000000000"),
        ("bos_token_id", "50256"),
        ("bos_token_id", True),
        ("bos_token_id", (50256,)),
        ("eos_token_id", 1.0),
        ("eos_token_id", (0, "1")),
    ],
)
def test_an_impossible_value_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}: expected .*, got |^{field}: expected .*; got "):
        GPT2Config(**{field: value})
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        GPT2Config.from_hf_dict({field: value})


def test_attention_scale():
    assert GPT2Config().attention_scale(3) == 64**-0.5
    assert GPT2Config(scale_attn_weights=False).attention_scale(3) == 1.0
    by_layer = GPT2Config(scale_attn_by_inverse_layer_idx=True)
    assert [by_layer.attention_scale(layer) for layer in range(3)] == [0.125, 0.125 / 2, 0.125 / 3]


def test_hub_configurations_are_the_presets():
    assert GPT2Config.from_hf_dict(HUB_MEDIUM) == GPT2Config.from_preset("gpt2-medium")
    assert GPT2Config.from_hf_dict(HUB_DISTIL) == GPT2Config.from_preset("distilgpt2")


def test_the_given_dict_stays_as_it_was():
    fields = json.loads(json.dumps(BIGCODE))
    GPT2Config.from_hf_dict(fields)
    assert fields == BIGCODE


def test_gpt_bigcode_is_multi_query_unless_told_otherwise():
    assert GPT2Config.from_hf_dict(BIGCODE).kv_heads == 1
    assert GPT2Config.from_hf_dict({"model_type": "gpt_bigcode"}).kv_heads == 1
    multi_head = {**BIGCODE, "multi_query": False, "num_key_value_heads": 4}
    assert GPT2Config.from_hf_dict(multi_head).kv_heads == 4
    assert GPT2Config.from_hf_dict({"model_type": "gpt_bigcode"}).activation_function == "gelu_pytorch_tanh"
    assert GPT2Config.from_hf_dict({"model_type": "gpt2"}).activation_function == "gelu_new"


def test_own_fields_describe_grouped_queries_and_windows():
    fields = {"model_type": "llorch_gpt2", "n_head": 8, "n_embd": 64, "num_kv_heads": 2, "sliding_window": 16}
    config = GPT2Config.from_hf_dict(fields)
    assert (config.kv_heads, config.sliding_window) == (2, 16)


def test_blocks_may_share_keys_and_values():
    config = GPT2Config.from_hf_dict({"n_layer": 4, "kv_sharing": [0, 0, 2, 0]})
    assert config.kv_sharing == (0, 0, 2, 0)
    assert config.cache_layers == 2
    assert [config.cache_layer(block) for block in range(4)] == [0, 0, 1, 0]
    assert [config.owns_cache_layer(block) for block in range(4)] == [True, False, True, False]
    hash(config)
    for block, sharing in ((1, [0, 2, 2, 3]), (2, [0, 0, 1, 3]), (3, [0, 1, 2, -1]), (0, ["0", 1, 2, 3])):
        with pytest.raises(ConfigError, match=rf"^kv_sharing\[{block}\]: expected {block} or an earlier block"):
            GPT2Config.from_hf_dict({"n_layer": 4, "kv_sharing": sharing})


def test_special_ids_default_to_gpt2s_only_in_its_vocabulary():
    assert GPT2Config.from_hf_dict({}).eos_token_id == 50256
    assert GPT2Config.from_hf_dict({"eos_token_id": None}).eos_token_id is None
    assert GPT2Config.from_hf_dict({"eos_token_id": 7}).bos_token_id == 50256
    assert GPT2Config.from_hf_dict({"vocab_size": 97}).eos_token_id is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (-1, None),
        (97, None),
        (2**70, None),
        ([], None),
        ([5], 5),
        ([5, 7], (5, 7)),
        ([7, 5, 7], (7, 5)),
        ([-1, 5, 97], 5),
        ([-1, 97], None),
    ],
)
def test_special_ids_outside_the_vocabulary_count_as_none(given, expected):
    config = GPT2Config.from_hf_dict({"vocab_size": 97, "eos_token_id": given})
    assert config.eos_token_id == expected
    if not isinstance(given, list):
        assert GPT2Config.from_hf_dict({"vocab_size": 97, "bos_token_id": given}).bos_token_id is None


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (0, (0,)), ((4, 2), (4, 2))])
def test_ids_that_end_a_text_are_a_tuple(given, ids):
    config = GPT2Config(vocab_size=5, eos_token_id=given)
    assert config.eos_ids == ids
    hash(config)


@pytest.mark.parametrize("ids", [5, -1, (), (4, 5), [4]])
def test_the_constructor_refuses_ids_outside_the_vocabulary(ids):
    with pytest.raises(ConfigError, match=r"^eos_token_id: expected null or an id below vocab_size=5"):
        GPT2Config(vocab_size=5, eos_token_id=ids)
    with pytest.raises(ConfigError, match=r"^bos_token_id: expected null or an id below vocab_size=5"):
        GPT2Config(vocab_size=5, bos_token_id=ids)


def test_transformers_common_names_are_understood():
    names = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3, "max_position_embeddings": 32}
    config = GPT2Config.from_hf_dict(names)
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (48, 6, 3, 32)
    assert GPT2Config.from_hf_dict({**names, "n_embd": 48, "n_ctx": 99}) == config
    for name, own in (("hidden_size", "n_embd"), ("num_attention_heads", "n_head")):
        with pytest.raises(ConfigError, match=rf"^{name}: contradicts {own}=12, got "):
            GPT2Config.from_hf_dict({**names, own: 12})


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("swish", "silu"),
        ("gelu_python", "gelu"),
        ("gelu_fast", "gelu_new"),
        ("gelu_accurate", "gelu_new"),
        ("gelu_python_tanh", "gelu_pytorch_tanh"),
        *((name, name) for name in ACTIVATIONS),
    ],
)
def test_activations_under_transformers_other_names(name, own):
    assert GPT2Config.from_hf_dict({"activation_function": name}).activation_function == own


@pytest.mark.parametrize(
    "fields",
    [
        {"_commit_hash": "0123", "_attn_implementation_internal": "sdpa"},
        {"pad_token_id": -1, "unk_token_id": 0, "decoder_start_token_id": None},
        {"attn_implementation": "eager", "name_or_path": "gpt2", "max_new_tokens": 3, "hidden_dropout": 0.1},
        {"per_layer_config": None, "quantization_config": None},
    ],
)
def test_bookkeeping_fields_are_ignored(fields):
    assert GPT2Config.from_hf_dict(fields) == GPT2Config.from_hf_dict({})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"n_lair": 2}, "n_lair"),
        ({"n_ctx": 0}, "n_positions"),
        ({"per_layer_config": {"0": {"n_head": 1}}}, "per_layer_config"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"multi_query": True, "num_kv_heads": 4}, "multi_query"),
        ({"multi_query": "yes"}, "multi_query"),
        ({"model_type": "gpt_bigcode", "num_key_value_heads": 4}, "num_key_value_heads"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_fields_that_cannot_be_followed_are_errors_that_name_them(fields, named):
    with pytest.raises(ConfigError, match=rf"^{named}: "):
        GPT2Config.from_hf_dict(fields)


def test_the_number_of_positions_is_n_ctx_only_where_nothing_else_says_it():
    assert GPT2Config.from_hf_dict({"n_ctx": 512}).n_positions == 512
    assert GPT2Config.from_hf_dict({"n_ctx": 512, "n_positions": None}).n_positions == 512
    for other in (64, 2048, None, "many"):  # transformers has not read it since its version 4
        assert GPT2Config.from_hf_dict({"n_ctx": other, "n_positions": 512}).n_positions == 512


def test_agreeing_aliases_are_no_contradiction():
    assert GPT2Config.from_hf_dict({"pruned_heads": {}, "num_attention_heads": 12}).n_head == 12
    assert GPT2Config.from_hf_dict({"multi_query": False, "n_head": 4}).kv_heads == 4


@given(
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 16),
    activation=st.sampled_from(ACTIVATIONS),
    inner=st.none() | st.integers(1, 99),
    window=st.none() | st.integers(1, 99),
    layers=st.integers(1, 5),
    data=st.data(),
)
def test_a_config_survives_the_way_through_json(heads, head_dim, activation, inner, window, layers, data):
    kv_heads = data.draw(st.sampled_from([None, *(n for n in range(1, heads + 1) if heads % n == 0)]))
    config = GPT2Config(
        vocab_size=11,
        n_layer=layers,
        kv_sharing=data.draw(st.sampled_from([None, tuple(range(layers)), (0,) * layers])),
        n_embd=heads * head_dim,
        n_head=heads,
        num_kv_heads=kv_heads,
        activation_function=activation,
        n_inner=inner,
        sliding_window=window,
        eos_token_id=data.draw(st.sampled_from([None, 0, 10, (3, 4)])),
    )
    assert GPT2Config.from_hf_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("fields", [None, 5, "gpt2", [1], [["n_layer", 2]]])
def test_what_is_no_mapping_is_refused(fields):
    with pytest.raises(ConfigError, match="fields: expected a mapping of names to values, got "):
        GPT2Config.from_hf_dict(fields)
