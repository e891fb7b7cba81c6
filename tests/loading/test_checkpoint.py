"""Loading and saving models: layouts, dtypes, logits against the references, memory, and where models come from."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from safetensors.numpy import load_file, save_file

from llorch_jax.config import GPT2Config
from llorch_jax.errors import CheckpointError, ConfigError, LlorchError, QuantizationError
from llorch_jax.loading import checkpoint, reading
from llorch_jax.loading.checkpoint import convert, load, save_model
from llorch_jax.loading.reading import load_config, load_params
from llorch_jax.model import forward
from llorch_jax.params import nbytes, param_shapes
from llorch_jax.quantization import DTYPES, quantize
from llorch_jax.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
TINY = {"vocab_size": 11, "n_positions": 7, "n_embd": 24, "n_layer": 2, "n_head": 4}
FILE = "model.safetensors"


def write(folder, **fields):
    """A directory as synth writes it, and the weights in it."""
    weights = synth.synth({**TINY, **fields}, 0)
    synth.write({**TINY, **fields}, weights, folder)
    return weights


def rewrite(folder, change):
    """Passes the stored tensors through `change`."""
    save_file(change(load_file(folder / FILE)), folder / FILE)


def random_params(config, dtype="float32"):
    """Made by NumPy: compiling `init_params` for each configuration would take most of these tests' time."""
    generator = np.random.default_rng(0)
    shapes = param_shapes(config, dtype)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), shapes)


def assert_same(one, other):
    """Equal trees, bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize(
    "name", ["tiny-base", "tiny-untied", "tiny-inner", "bigcode-tiny.inner", "bigcode-tiny.untied"]
)
def test_logits_are_the_references(tmp_path, name):
    file, _, variant = name.partition(".")
    sidecar = json.loads((REFERENCE / f"{file}.json").read_text())
    parameters, digest = sidecar["parameters"], sidecar["weights_sha256"]
    fields = parameters["configs"][variant] if variant else parameters["config"]
    weights = synth.synth(fields, parameters["seed"])
    assert synth.digest(weights) == (digest[variant] if variant else digest)
    synth.write(fields, weights, tmp_path)
    model = load(tmp_path)
    prefix = f"{variant}." if variant else ""
    with np.load(REFERENCE / f"{file}.npz") as arrays:
        logits = forward(model.params, model.config, arrays[f"{prefix}tokens"])
        np.testing.assert_allclose(logits, arrays[f"{prefix}logits"], rtol=0, atol=1e-4)


def test_a_loaded_model_knows_where_it_is_from(tmp_path):
    write(tmp_path / "small")
    model = load(str(tmp_path / "small"))
    assert (model.name, model.directory, model.tokenizer) == ("small", tmp_path / "small", None)
    assert model.config == load_config(tmp_path / "small") == GPT2Config(**TINY)
    assert "Array" not in repr(model)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}, {"model_type": "gpt_bigcode"}])
def test_prefixes_are_optional(tmp_path, fields):
    write(tmp_path, **fields)
    params = load(tmp_path).params
    for prefix in ("", "transformer."):
        rewrite(
            tmp_path,
            lambda weights, prefix=prefix: {
                name if name == "lm_head.weight" else prefix + name.removeprefix("transformer."): tensor
                for name, tensor in weights.items()
            },
        )
        assert_same(load(tmp_path).params, params)


def test_old_buffers_and_a_copied_output_projection_are_dropped(tmp_path):
    write(tmp_path)
    params = load(tmp_path).params
    buffers = {
        "h.0.attn.bias": np.ones((1, 1, 7, 7), bool),
        "transformer.h.1.attn.bias": np.ones((1, 1, 7, 7), np.uint8),
        "h.1.attn.masked_bias": np.array(-1e4, np.float32),
    }
    rewrite(tmp_path, lambda weights: weights | buffers | {"lm_head.weight": weights["wte.weight"]})
    assert_same(load(tmp_path).params, params)


def test_shards(tmp_path):
    write(tmp_path, tie_word_embeddings=False)
    params = load(tmp_path).params
    weights = load_file(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(weights)}
    for shard in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == shard}, tmp_path / shard)
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load(tmp_path).params, params)


def test_multi_head_bigcode_rows_are_put_in_order(tmp_path):
    write(tmp_path / "gpt2")
    heads, head_dim = 4, 6

    def interleave(weights):
        """The same model as gpt_bigcode stores it: [out, in], each head's query, key and value rows together."""
        linear = {}
        for name, tensor in weights.items():
            tensor = tensor.T if re.search(r"c_\w+\.weight", name) else tensor
            if "c_attn" in name:
                kinds = np.split(tensor, 3)
                rows = [kind[head * head_dim : (head + 1) * head_dim] for head in range(heads) for kind in kinds]
                tensor = np.concatenate(rows)
            linear[name] = np.ascontiguousarray(tensor)
        return linear

    write(tmp_path / "bigcode", model_type="gpt_bigcode", multi_query=False)
    save_file(interleave(load_file(tmp_path / "gpt2" / FILE)), tmp_path / "bigcode" / FILE)
    model = load(tmp_path / "bigcode")
    assert model.config.kv_heads == 4
    assert_same(model.params, load(tmp_path / "gpt2").params)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_convert_exactly_or_round_once(tmp_path, stored, dtype):
    write(tmp_path)
    narrow = {"float16": np.float16, "bfloat16": jnp.bfloat16}[stored]
    rewrite(tmp_path, lambda weights: {name: tensor.astype(narrow) for name, tensor in weights.items()})
    wte = load_file(tmp_path / FILE)["wte.weight"]
    params = load(tmp_path, weights=dtype).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    np.testing.assert_array_equal(params.wte, wte.astype(params.wte.dtype))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.dtype("float32")])
def test_dtypes_may_be_objects(tmp_path, dtype):
    write(tmp_path)
    assert load(tmp_path, weights=dtype).params.wte.dtype == dtype


@pytest.mark.parametrize("weights", ["int2", "float64", "half-precision", 8, jnp.int32])
def test_other_formats_are_errors(tmp_path, weights):
    with pytest.raises(QuantizationError, match="expected one of float32, bfloat16, float16, int8, w8a8, int4; got"):
        load(tmp_path, weights=weights)
    with pytest.raises(CheckpointError, match=r"dtype: expected one of float32, bfloat16, float16; got "):
        convert(tmp_path, tmp_path / "converted", weights)


@pytest.mark.parametrize(("weights", "group_size"), [("int8", None), ("int8", 32), ("int4", None), ("int4", 64)])
@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_quantizing_at_load_equals_quantizing_later(tmp_path, weights, group_size, family, stored, monkeypatch):
    monkeypatch.setattr("llorch_jax.quantization._BLOCK", 24 * 4)  # four rows of the embedding at a time
    write(tmp_path, model_type=family, multi_query=False)
    rewrite(tmp_path, lambda tensors: {name: tensor.astype(stored) for name, tensor in tensors.items()})
    params = load(tmp_path, weights=weights, group_size=group_size).params
    assert_same(params, quantize(load(tmp_path).params, weights, group_size))


def test_weights_that_are_not_finite_are_refused_by_place(tmp_path, monkeypatch):
    monkeypatch.setattr("llorch_jax.quantization._BLOCK", 24 * 4)
    write(tmp_path)
    broken = np.zeros((11, 24), np.float32)
    broken[6, 3] = np.nan
    rewrite(tmp_path, lambda weights: weights | {"wte.weight": broken})
    with pytest.raises(CheckpointError, match=r"wte\.weight in .*, in the rows from 4: expected finite .* at \[2, 3\]"):
        load(tmp_path, weights="int8")


def test_quantized_weights_are_not_saved_in_hugging_faces_layout(tmp_path):
    write(tmp_path)
    model = load(tmp_path, weights="int4")
    with pytest.raises(QuantizationError, match="params: expected floating point, got int8 in wte; Hugging Face's"):
        save_model(tmp_path / "saved", model.config, model.params)
    assert not (tmp_path / "saved").exists()


def test_values_beyond_float16_are_an_error(tmp_path):
    write(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {"ln_f.bias": np.full(24, 7e4, np.float32)})
    with pytest.raises(CheckpointError, match=r"ln_f\.bias in .*: expected values that fit float16, got 70000"):
        load(tmp_path, weights="float16")


def test_progress_counts_bytes_to_the_end(tmp_path):
    write(tmp_path)
    calls = []
    params = load(tmp_path, progress=lambda done, total: calls.append((done, total))).params
    assert calls == sorted(calls)
    assert calls[-1] == (nbytes(params), nbytes(params))
    assert len(calls) == len(jax.tree.leaves(params))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False, "n_inner": 50, "activation_function": "relu"},
        {"num_kv_heads": 1},
        {"num_kv_heads": 1, "tie_word_embeddings": False, "eos_token_id": (3, 5)},
        {"num_kv_heads": 2},
        {"sliding_window": 3, "tie_word_embeddings": False},
        {"kv_sharing": (0, 0), "num_kv_heads": 1},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_models_load_bit_for_bit(tmp_path, fields, dtype):
    config = GPT2Config(**TINY, **fields)
    params = random_params(config, dtype)
    save_model(tmp_path / "saved", config, params, dtype=dtype)
    model = load(tmp_path / "saved", weights=dtype)
    assert model.config == config
    assert_same(model.params, params)


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "gpt2"),
        ({"tie_word_embeddings": False}, "gpt2"),
        ({}, "gpt_bigcode"),
        ({"tie_word_embeddings": False}, "gpt_bigcode"),
    ],
)
def test_saved_files_are_those_that_transformers_reads(tmp_path, fields, family):
    write(tmp_path / "source", model_type=family, **fields)
    convert(tmp_path / "source", tmp_path / "saved")
    source, saved = load_file(tmp_path / "source" / FILE), load_file(tmp_path / "saved" / FILE)
    assert source.keys() == saved.keys()
    for name in source:
        np.testing.assert_array_equal(source[name], saved[name])
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    written = json.loads((tmp_path / "source" / "config.json").read_text())
    assert {name: config[name] for name in written} == written
    assert "num_kv_heads" not in config


def test_converting_to_half_precision_halves_the_file(tmp_path):
    write(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "half", "float16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert {tensor.dtype.name for tensor in load_file(tmp_path / "half" / FILE).values()} == {"float16"}
    half = load(tmp_path / "half").params
    rounded = jax.tree.map(lambda leaf: leaf.astype("float16").astype("float32"), load(tmp_path / "source").params)
    assert_same(half, rounded)


def test_a_model_can_be_converted_in_place(tmp_path):
    write(tmp_path)
    with pytest.raises(CheckpointError, match=r"got one with config\.json, model\.safetensors; pass overwrite=True"):
        convert(tmp_path, tmp_path, "bfloat16")
    assert load_file(tmp_path / FILE)["wte.weight"].dtype.name == "float32"
    convert(tmp_path, tmp_path, "bfloat16", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", FILE]
    assert load_file(tmp_path / FILE)["wte.weight"].dtype.name == "bfloat16"


def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = load(tmp_path)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "hf_fields", fail)  # after the weights are written
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        save_model(tmp_path, model.config, model.params, dtype="float16", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "vocab.json"])
def test_a_model_is_replaced_only_when_asked(tmp_path, name):
    config = GPT2Config(**TINY)
    params = random_params(config)
    (tmp_path / name).write_text("precious")
    (tmp_path / "notes.txt").write_text("mine")
    for write_model in (
        lambda **options: save_model(tmp_path, config, params, **options),
        lambda **options: convert("no/such/model", tmp_path, **options),  # refused before anything is loaded
    ):
        with pytest.raises(CheckpointError, match=rf"without a model, got one with {name}; pass overwrite=True"):
            write_model()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "precious", "notes.txt": "mine"}
    save_model(tmp_path, config, params, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    config = GPT2Config(**TINY)
    (tmp_path / FILE).mkdir() if kind == "folder" else os.mkfifo(tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a regular file, got a "):
        save_model(tmp_path, config, random_params(config), overwrite=True)
    assert os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize("ids", [(None, None), (3, 5), (3, (5, 6))])
def test_ids_are_saved_where_transformers_looks_for_them(tmp_path, ids):
    config = GPT2Config(**TINY, bos_token_id=ids[0], eos_token_id=ids[1])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')  # of another model
    save_model(tmp_path, config, random_params(config), overwrite=True)
    assert load(tmp_path).config == config
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.get("bos_token_id") == ids[0]
    assert saved.get("eos_token_id") == (list(ids[1]) if isinstance(ids[1], tuple) else ids[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name_and_place(tmp_path, bad, dtype):
    write(tmp_path)

    def spoil(weights):
        weights["h.1.mlp.c_fc.weight"][3, 5] = bad
        return {name: tensor.astype(DTYPES[dtype]) for name, tensor in weights.items()}

    rewrite(tmp_path, spoil)
    message = rf"^h\.1\.mlp\.c_fc\.weight in .*: expected finite weights, got {bad} at \[3, 5\], one of 1"
    for loaded in ("float32", dtype):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path, weights=loaded)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    config = GPT2Config(**TINY)
    params = random_params(config)
    broken = params.replace(wpe=params.wpe.at[2, 1].set(jnp.nan))
    with pytest.raises(CheckpointError, match=r"^wpe\.weight: expected finite weights, got nan at \[2, 1\]"):
        save_model(tmp_path / "new", config, broken)
    assert not os.listdir(tmp_path)


def test_saving_checks_params_against_the_configuration(tmp_path):
    config = GPT2Config(**TINY)
    params = random_params(config)
    other = GPT2Config(**{**TINY, "n_embd": 20})
    with pytest.raises(CheckpointError, match=r"expected shape \[11, 20\] for wte\.weight, got \[11, 24\]"):
        save_model(tmp_path / "new", other, params)
    for fields in ({"n_layer": 3}, {"tie_word_embeddings": False}):
        with pytest.raises(CheckpointError, match=r"params: expected a model's with n_layer=.*, got another tree"):
            save_model(tmp_path / "new", GPT2Config(**{**TINY, **fields}), params)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: cannot be written \(File exists\)"):
        save_model(tmp_path / "file", config, params)
    assert os.listdir(tmp_path) == ["file"]


def test_the_tokenizer_goes_with_the_model(tmp_path):
    config = GPT2Config(**{**TINY, "vocab_size": 50257})
    tokenizer = Tokenizer.gpt2()
    save_model(tmp_path / "saved", config, random_params(config), tokenizer)
    again = load(tmp_path / "saved").tokenizer
    assert again is not None
    assert again.encode("Once upon a time") == tokenizer.encode("Once upon a time")


def test_config_errors_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"config\.json: model_type: expected one of .*; got 'llama'"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: model_type: expected one of .*; got 'llama'"):
        load_params(tmp_path, GPT2Config(**TINY))


@pytest.mark.parametrize(
    ("generation", "bos", "eos"),
    [
        ({"eos_token_id": [3, 5], "temperature": 0.5}, 1, (3, 5)),
        ({"bos_token_id": 0, "eos_token_id": None}, 0, 2),
        ({"eos_token_id": 99}, 1, None),
        ({}, 1, 2),
    ],
)
def test_ids_of_the_generation_configuration_come_first(tmp_path, generation, bos, eos):
    write(tmp_path, bos_token_id=1, eos_token_id=2)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = load(tmp_path).config
    assert (config.bos_token_id, config.eos_token_id) == (bos, eos)


def test_errors_of_the_generation_configuration_name_it(tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id: expected null or an id"):
        load(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected JSON"):
        load(tmp_path)


def test_params_of_another_configuration_are_an_error(tmp_path):
    write(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"wpe\.weight in model\.safetensors: expected shape \[8, 24\].*got \[7, 24\]"
    ):
        load_params(tmp_path, GPT2Config(**{**TINY, "n_positions": 8}))


def test_demo_is_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "loading" / "checkpoint.py"))
    with pytest.raises(CheckpointError, match=r"demo: this installation lacks the model.*install it again"):
        load("demo")
    write(tmp_path / "assets" / "demo")
    assert load("demo").name == "demo"
    (tmp_path / "elsewhere" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("demo").name == "demo"
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        load(Path("demo"))


def test_a_file_is_not_a_model(tmp_path):
    write(tmp_path)
    with pytest.raises(CheckpointError, match=r"source: expected 'demo', a directory .* is a file$"):
        load(tmp_path / FILE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x" * 300, "cannot be read .File name too long"),
        ("nul\0", "cannot be read .no file can have this name"),
        ("lone\ud800", "cannot be read .no file can have this name"),
        ("two\nlines", r"'two\\\\nlines' is no such directory"),
        ("", "'' is no such directory"),
        (3, "got int"),
        (None, "got NoneType"),
        (b"demo", "got bytes"),
    ],
)
def test_impossible_sources_are_one_line(source, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(source)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", FILE, "tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_whatever_is_no_regular_file_is_refused(tmp_path, name, kind):
    write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir() if kind == "folder" else os.mkfifo(tmp_path / name)
    if name == "vocab.json":
        (tmp_path / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match=rf"{name}: expected a regular file, got a "):
        load(tmp_path)


def test_deep_json_is_one_line(tmp_path):
    write(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    for name, content in (("vocab.json", "["), ("config.json", '{"id2label":')):
        (tmp_path / name).write_text(content * 100_000)
        with pytest.raises(CheckpointError, match=rf"{name}: expected JSON, got something else .nested too deeply"):
            load(tmp_path)


def test_more_blocks_than_tensors_are_refused_before_any_is_described(tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "n_layer": 10**12}))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"tensors of n_layer=1000000000000 blocks, as config\.json says, got 28"):
        load(tmp_path)
    assert time.perf_counter() - start < 5
    config = load_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks, as config\.json says, got 28 tensors"):
        reading.check_size(tmp_path, config)
    (tmp_path / FILE).unlink()
    reading.check_size(tmp_path, config)  # nothing to compare with


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_inner"])
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, field):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, field: 10**15}))
    with pytest.raises(CheckpointError, match=r"in model\.safetensors: expected shape \[.*1000000000000000"):
        load(tmp_path)


def test_a_directory_has_no_revision(tmp_path):
    write(tmp_path)
    with pytest.raises(LlorchError, match="revision: only hub models have one"):
        load(tmp_path, revision="main")


MEASURE = """
import ctypes, re, sys
import jax.numpy as jnp
from llorch_jax.loading.reading import load_config, load_params
from llorch_jax.params import nbytes

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

config = load_config(sys.argv[1])
jnp.zeros(1).block_until_ready()
if sys.argv[2] == "int8":  # the compiler's own memory is not meant: use it now, give it back, and forget the peak
    load_params(sys.argv[1], config, sys.argv[2])
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
params = load_params(sys.argv[1], config, sys.argv[2])
print(nbytes(params), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("weights", "smallest", "slack"), [("float32", 80e6, 20e6), ("bfloat16", 40e6, 20e6), ("int8", 20e6, 30e6)]
)
def test_loading_never_holds_two_copies(tmp_path, weights, smallest, slack):
    """The slack is for the largest tensor in flight, what rounds it, and the allocator."""
    write(tmp_path, vocab_size=4000, n_positions=256, n_embd=512, n_layer=6, n_head=8)
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path), weights]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert size > smallest
    assert peak < 1.1 * size + slack
