"""GGUF files written by the `gguf` package: weights and texts as from a checkpoint, and every kind of damage."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from gguf import quants
from tiny import random_model

import llorch_jax as lj
from llorch_jax.cli import app, loading
from llorch_jax.linear import QuantizedMatrix
from llorch_jax.loading.hf_format import stored_tensors

TYPE = gguf.GGMLQuantizationType
NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f": "output_norm",
    "lm_head.weight": "output.weight",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOKENS = np.array([[5, 6, 7, 250, 1, 99]], np.int32)


def tensors_of(model):
    """Names and arrays as llama.cpp's converter writes them: output-major, all queries first."""
    family = "gpt_bigcode" if model.config.kv_heads == 1 else "gpt2"
    found = {}
    pairs = zip(jax.tree.leaves(stored_tensors(model.config, family)), jax.tree.leaves(model.params), strict=True)
    for tensor, param in pairs:
        array = tensor.from_param(np.asarray(param))
        name = tensor.name.replace("h.", "blk.", 1) if tensor.name.startswith("h.") else tensor.name
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = np.ascontiguousarray(array.T if tensor.transposed else array)
    return found


def write(path, model, kind=TYPE.F32, change=lambda tensors: None, metadata=lambda writer: None, architecture=None):
    """Matrices in a type, everything else in float32."""
    config = model.config
    architecture = architecture or ("starcoder" if config.kv_heads == 1 else "gpt2")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.inner_dim)
    writer.add_head_count(config.n_head)
    if config.kv_heads == 1:
        writer.add_head_count_kv(1)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tokens = [model.tokenizer.id_to_token(id) for id in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([])
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_eos_token_id(256)
    metadata(writer)
    tensors = tensors_of(model)
    change(tensors)
    for name, array in tensors.items():
        wide = array.ndim < 2 or name == "position_embd.weight"
        to = TYPE.F32 if wide else kind
        writer.add_tensor(name, quants.quantize(array, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(**changes):
    return random_model(
        **{
            "n_embd": 64,
            "n_head": 4,
            "num_kv_heads": 4,
            "activation_function": "gelu_pytorch_tanh",
            "eos_token_id": 256,
        }
        | changes
    )


@pytest.fixture(scope="module")
def model():
    return make()


def logits(model):
    return np.asarray(lj.forward(model.params, model.config, TOKENS))


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"tie_word_embeddings": False}])
def test_float32_files_give_the_same_weights_and_texts(tmp_path, changes):
    model = make(**changes)
    found = lj.load(write(tmp_path / "m.gguf", model))
    assert found.config == dataclasses.replace(model.config, bos_token_id=found.config.bos_token_id)
    jax.tree.map(np.testing.assert_array_equal, found.params, model.params)
    text = "the cat<|endoftext|> sat"
    assert found.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert found.tokenizer.eos_id == 256
    assert (found.name, found.directory) == ("m", None)


@pytest.mark.parametrize("kind", [TYPE.F16, TYPE.BF16, TYPE.Q8_0, TYPE.Q4_0])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_other_types_are_kept_bit_for_bit(tmp_path, kind, kv_heads):
    """What the package itself makes of the stored bytes is what the library computes with."""
    model = make(num_kv_heads=kv_heads)
    found = lj.load(write(tmp_path / "m.gguf", model, kind))

    def rounded(array):
        array = np.asarray(array)
        return quants.dequantize(quants.quantize(array, kind), kind).reshape(array.shape) if array.ndim == 2 else array

    wanted = jax.tree.map(rounded, model.params).replace(wpe=model.params.wpe)
    widened = lj.load(tmp_path / "m.gguf", weights="float32")
    jax.tree.map(np.testing.assert_array_equal, widened.params, wanted)
    np.testing.assert_allclose(
        logits(found), logits(dataclasses.replace(model, params=wanted)), atol=2e-2 * np.abs(logits(model)).max()
    )
    matrix = found.params.blocks[0].fc.weight
    if kind in (TYPE.F16, TYPE.BF16):
        assert matrix.dtype.name == {TYPE.F16: "float16", TYPE.BF16: "bfloat16"}[kind]
    else:
        assert isinstance(matrix, QuantizedMatrix)
        assert (matrix.bits, matrix.group_size) == ({TYPE.Q8_0: 8, TYPE.Q4_0: 4}[kind], 32)


def test_a_second_copy_of_the_embedding_is_the_tied_projection(tmp_path, model):
    def twice(tensors):
        tensors["output.weight"] = tensors["token_embd.weight"]

    assert lj.load(write(tmp_path / "m.gguf", model, TYPE.Q8_0, twice)).params.lm_head is None


def test_a_file_can_be_quantized_once_and_only_once(tmp_path, model):
    path = write(tmp_path / "m.gguf", model)
    jax.tree.map(np.testing.assert_array_equal, lj.load(path, weights="int8").params, lj.quantize(model.params, "int8"))
    with pytest.raises(lj.QuantizationError, match=r"got int4; q\.gguf is quantized already"):
        lj.load(write(tmp_path / "q.gguf", model, TYPE.Q8_0), weights="int4")


def rename(tensors):
    tensors["blk.9.ffn_up.weight"] = tensors.pop("blk.0.ffn_up.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("output_norm.bias"), "output_norm.bias: expected this tensor in a gpt2, found none"),
        (lambda t: t.pop("token_embd.weight"), "token_embd.weight: expected this tensor"),
        (rename, "blk.0.ffn_up.weight: expected this tensor"),
        (lambda t: t.update(extra=np.zeros(4, np.float32)), "extra: expected no such tensor in a gpt2"),
        (lambda t: t.update({"output_norm.bias": np.zeros(4, np.float32)}), r"expected shape \[64\], .* got \[4\]"),
        (lambda t: t.update({"output_norm.bias": np.full(64, np.nan, np.float32)}), "expected finite weights"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, model, change, message):
    with pytest.raises(lj.CheckpointError, match=message):
        lj.load(write(tmp_path / "m.gguf", model, change=change))


def test_an_unsupported_type_is_named(tmp_path, model):
    with pytest.raises(lj.CheckpointError, match="expected one of F32, F16, BF16, Q8_0, Q4_0; got Q5_0"):
        lj.load(write(tmp_path / "m.gguf", model, TYPE.Q5_0))


def test_a_tokenizer_without_its_merges_is_refused(tmp_path, model):
    class Pairs:
        def __getattr__(self, name):
            return getattr(model.tokenizer, name)

        def id_to_token(self, id):
            return "ab" if id == 5 else model.tokenizer.id_to_token(id)

    with pytest.raises(lj.CheckpointError, match=r"tokenizer\.ggml\.merges: expected a list of texts, got None"):
        lj.load(write(tmp_path / "m.gguf", dataclasses.replace(model, tokenizer=Pairs())))


def test_merges_are_applied(tmp_path, model):
    class Merged:
        def __getattr__(self, name):
            return getattr(model.tokenizer, name)

        def id_to_token(self, id):
            return "ab" if id == 5 else model.tokenizer.id_to_token(id)

    def merge(writer):
        writer.kv_data[0].pop("tokenizer.ggml.merges", None)
        writer.add_token_merges(["a b"])

    found = lj.load(write(tmp_path / "m.gguf", dataclasses.replace(model, tokenizer=Merged()), metadata=merge))
    assert found.tokenizer.encode("cab") == [*model.tokenizer.encode("c"), 5]


def test_another_architecture_is_named(tmp_path, model):
    with pytest.raises(lj.ConfigError, match=r"general\.architecture: expected one of gpt2, starcoder; got 'llama'"):
        lj.load(write(tmp_path / "m.gguf", model, architecture="llama"))


@pytest.mark.parametrize("kept", [0, 3, 24, 400, 5000, -64])
def test_a_truncated_file_is_refused(tmp_path, model, kept):
    path = write(tmp_path / "m.gguf", model)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(lj.CheckpointError, match="expected a whole GGUF file, got none"):
        lj.load(path)


def test_something_else_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no such thing" * 100)
    with pytest.raises(lj.CheckpointError, match="expected a whole GGUF file"):
        lj.load(path)
    with pytest.raises(lj.CheckpointError, match="a GGUF file, or a hub id"):
        lj.load(tmp_path / "none.gguf")


def test_inspect_and_generate_take_a_file(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr(loading, "enable_compilation_cache", lambda: None)
    path = str(write(tmp_path / "m.gguf", model, TYPE.Q8_0))
    assert app.run(["inspect", path]) == 0
    assert "MB Q8_0" in capsys.readouterr().out
    assert app.run(["generate", "a", "-m", path, "-n", "3"]) == 0
    assert capsys.readouterr().out.startswith("a")
