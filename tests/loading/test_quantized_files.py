"""Models stored in low precision: read as they were written, and refused by name where that cannot be."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import random_model

import llorch_jax as lj
from llorch_jax.cli import app, loading

WHOLE_ROWS = [("int8", None), ("w8a8", None), ("bfloat16", None), ("float16", None)]
FORMATS = [*WHOLE_ROWS, ("int8", 32), ("int4", 32), ("int4", 64)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = random_model(n_embd=40, tie_word_embeddings=False)  # 40 columns: groups are padded
    path = tmp_path_factory.mktemp("float") / "model"
    lj.save_model(path, model.config, model.params, model.tokenizer)
    return path


@pytest.fixture(scope="module")
def stored(source, tmp_path_factory):
    """A directory with int8 weights."""
    path = tmp_path_factory.mktemp("int8") / "model"
    lj.quantize_model(source, path, "int8")
    return path


@pytest.mark.parametrize(("kept", "asked"), [("int8", "w8a8"), ("w8a8", "int8")])
def test_the_same_arrays_serve_with_activations_rounded_or_not(source, tmp_path, kept, asked):
    lj.quantize_model(source, tmp_path / "model", kept)
    same(lj.load(tmp_path / "model", weights=asked).params, lj.load(source, weights=asked).params)
    with pytest.raises(lj.QuantizationError, match=f"weights: expected {kept}, as the model stores them, got int4"):
        lj.load(tmp_path / "model", weights="int4")
    grouped = tmp_path / "grouped"
    lj.quantize_model(source, grouped, "int8", group_size=32)
    with pytest.raises(lj.QuantizationError, match="weights: expected int8 in groups of 32"):
        lj.load(grouped, weights="w8a8")


def test_parameters_of_two_formats_are_refused(source, tmp_path):
    model = lj.load(source, weights="int8")
    mixed = dataclasses.replace(model.params, lm_head=lj.load(source, weights="w8a8").params.blocks[0].fc.weight)
    blocks = lj.load(source, weights="w8a8").params.blocks
    for params in (mixed, dataclasses.replace(model.params, blocks=(model.params.blocks[0], *blocks[1:]))):
        with pytest.raises(lj.QuantizationError, match="params: expected all of a model as `quantize` makes"):
            lj.save_quantized(tmp_path / "model", model.config, params, model.tokenizer)


@pytest.fixture
def copied(stored, tmp_path):
    """A copy to damage."""
    return shutil.copytree(stored, tmp_path / "copy")


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
def test_what_is_loaded_is_what_loading_the_float_model_in_that_format_gives(source, tmp_path, weights, group_size):
    lj.quantize_model(source, tmp_path / "model", weights, group_size)
    wanted = lj.load(source, weights=weights, group_size=group_size)
    progress = []
    for asked in ({}, {"weights": weights}, {"weights": weights, "group_size": group_size}):
        found = lj.load(tmp_path / "model", **asked, progress=lambda *given: progress.append(given))
        assert found.config == wanted.config
        same(found.params, wanted.params)
    done, total = progress[-1]
    assert done == total == sum(leaf.nbytes for leaf in jax.tree.leaves(wanted.params))
    assert lj.generate(found, "a", max_new_tokens=3).token_ids == lj.generate(wanted, "a", max_new_tokens=3).token_ids


def test_a_tied_embedding_is_stored_once(tmp_path):
    model = random_model()
    lj.save_quantized(tmp_path / "model", model.config, lj.quantize(model.params, "int8"), model.tokenizer)
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert [name for name in names if "wte" in name or "lm_head" in name] == ["wte.codes", "wte.scales"]
    assert lj.load(tmp_path / "model").params.lm_head is None


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_widening_to_float32_is_exact(source, tmp_path, weights):
    lj.quantize_model(source, tmp_path / "model", weights)
    same(
        lj.load(tmp_path / "model", weights="float32").params,
        lj.quantize(lj.load(source, weights=weights).params, "float32"),
    )


@pytest.mark.parametrize(
    "asked", [{"weights": "int4"}, {"weights": "float32"}, {"group_size": 32}, {"weights": "bfloat16"}]
)
def test_weights_are_not_rounded_twice(stored, asked):
    with pytest.raises(lj.QuantizationError, match="weights: expected int8, as the model stores them, got"):
        lj.load(stored, **asked)


def test_saving_for_hugging_face_is_refused(stored, tmp_path):
    model = lj.load(stored)
    with pytest.raises(lj.QuantizationError, match="got int8 in wte; Hugging Face's layout has no such weights"):
        lj.save_model(tmp_path / "out", model.config, model.params)
    with pytest.raises(lj.QuantizationError, match="weights: expected int8"):
        lj.convert(stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_of_another_model_or_of_mixed_formats_are_refused(source, tmp_path):
    model = lj.load(source)
    mixed = lj.quantize(model.params, "int8").replace(wte=model.params.wte)
    other = lj.quantize(random_model().params, "int8")
    for params in (mixed, other):
        with pytest.raises(lj.QuantizationError, match="params: expected all of a model"):
            lj.save_quantized(tmp_path / "out", model.config, params)
    assert not (tmp_path / "out").exists()


def test_a_model_in_the_way_is_kept(source, stored, tmp_path):
    target = shutil.copytree(source, tmp_path / "there")
    with pytest.raises(lj.CheckpointError, match="expected a directory without a model"):
        lj.quantize_model(source, target, "int4")
    assert lj.load(target).params.wte.dtype == "float32"
    lj.quantize_model(source, target, "int4", overwrite=True)
    assert lj.load(target).params.blocks[0].fc.weight.bits == 4


def rewrite(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.pop("blocks.0.qkv.weight.scales"),
            r"lacks 1 tensor \(blocks\.0\.qkv\.weight\.scales\); expected the",
        ),
        (lambda a: a.update(extra=np.zeros(3, np.int8)), r"has unexpected 1 tensor \(extra\); expected the"),
        (
            lambda a: a.update({"wte.codes": a["wte.codes"][:, :-1]}),
            r"wte.codes in .*: expected I8 \[257, 40\], .* got I8",
        ),
        (lambda a: a.update({"wte.codes": a["wte.codes"].view(np.uint8)}), r"expected I8 .* got U8"),
        (lambda a: a.update({"wte.scales": a["wte.scales"] * np.float32(np.nan)}), "wte.scales in .*: expected finite"),
    ],
)
def test_damaged_files_are_refused_by_name(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(lj.CheckpointError, match=message):
        lj.load(copied)


def test_a_file_of_one_tensor_is_told_in_the_singular(copied):
    save_file({"extra": np.zeros(3, np.int8)}, copied / "model.safetensors")
    with pytest.raises(lj.CheckpointError, match=r"blocks, as config\.json says, got 1 tensor; are both files"):
        lj.load(copied)


@pytest.mark.parametrize("given", ["int8", {"format": "int3", "group_size": None}, {"format": "int8"}])
def test_an_unknown_format_in_the_configuration_is_refused(copied, given):
    fields = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**fields, "_llorch_weights": given}))
    with pytest.raises(lj.CheckpointError, match="_llorch_weights: expected a format"):
        lj.load(copied)


def test_the_command_writes_what_inspect_shows(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "enable_compilation_cache", lambda: None)
    target = str(tmp_path / "small")
    assert app.run(["quantize", str(source), target, "--weights", "int4", "--group-size", "64"]) == 0
    assert f"wrote {target}" in capsys.readouterr().out.replace("\n", "")
    assert app.run(["inspect", target]) == 0
    assert " in int4" in capsys.readouterr().out
    assert app.run(["inspect", target, "--weights", "int8"]) == 1
    assert "--weights: expected int4 in groups of 64" in capsys.readouterr().err
    assert app.run(["generate", "a", "-m", target, "-n", "3"]) == 0
    assert app.run(["quantize", str(source), target, "--weights", "int8"]) == 1
    assert "give --overwrite" in capsys.readouterr().err
    assert app.run(["quantize", str(source), target]) == 2
