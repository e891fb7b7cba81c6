"""Safetensors files of a model directory: every way in which they can be wrong, and writing them."""

import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
import synth
from safetensors.numpy import load_file, save_file

from llorch_jax.errors import CheckpointError
from llorch_jax.loading.checkpoint import load
from llorch_jax.loading.safetensors_files import cast, find_tensors, replacing_files, write_tensors
from llorch_jax.quantization import DTYPES

CONFIG = {"vocab_size": 11, "n_positions": 7, "n_embd": 24, "n_layer": 2, "n_head": 4}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A tiny model's directory."""
    synth.write(CONFIG, synth.synth(CONFIG, 0), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(folder):
    """The same in three shards with an index."""
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    shards = {f"model-0000{n}-of-00003.safetensors": dict(list(weights.items())[n - 1 :: 3]) for n in (1, 2, 3)}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(folder, **tensors):
    """Replaces tensors, or drops those that are None; `__` in a name stands for a dot."""
    weights = load_file(folder / FILE)
    for name, tensor in tensors.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / FILE)


def fails(folder, *patterns):
    """Loading must fail with one line that has all the patterns, and without having read any tensor."""
    read = []
    with pytest.raises(CheckpointError) as caught:
        load(folder, progress=lambda done, total: read.append(done))
    assert "\n" not in str(caught.value)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    assert not read


def test_missing_configuration(folder):
    (folder / "config.json").unlink()
    fails(folder, r"config\.json: missing; expected a model directory")


@pytest.mark.parametrize("text", ["", "{", "\xff", "not json"])
def test_invalid_configuration(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    fails(folder, r"config\.json: expected JSON, got something else", "again")


def test_configuration_that_is_no_object(folder):
    (folder / "config.json").write_text("[1, 2]")
    fails(folder, r"config\.json: expected a JSON object, got '\[1, 2\]'")


def test_no_weights(folder):
    (folder / FILE).unlink()
    fails(folder, r"expected model\.safetensors or model\.safetensors\.index\.json, found neither")


def test_pickled_weights_are_never_loaded(folder):
    (folder / FILE).rename(folder / "pytorch_model.bin")
    fails(folder, r"found only pytorch_model\.bin", "never loaded", r"save_pretrained\(safe_serialization=True\)")


def test_missing_tensors(folder):
    change(folder, h__0__ln_1__weight=None)
    fails(folder, r"lacks 1 tensor \(h\.0\.ln_1\.weight\); expected the 28 tensors that config\.json describes")
    change(folder, h__1__ln_1__bias=None, h__1__ln_2__bias=None, ln_f__bias=None)
    fails(folder, r"lacks 4 tensors \(h\.0\.ln_1\.weight, h\.1\.ln_1\.bias, h\.1\.ln_2\.bias, \.\.\.\)")


def test_surplus_tensors(folder):
    change(folder, h__2__ln_1__weight=np.zeros(24, np.float32))
    fails(folder, r"has unexpected 1 tensor \(h\.2\.ln_1\.weight\); expected the 28 tensors")


def test_untied_model_without_its_output_projection(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": False}))
    fails(folder, r"lacks 1 tensor \(lm_head\.weight\)")


def test_wrong_shape(folder):
    change(folder, h__0__attn__c_attn__weight=np.zeros((72, 24), np.float32))
    fails(folder, r"h\.0\.attn\.c_attn\.weight in model\.safetensors: expected shape \[24, 72\].*got \[72, 24\]")


@pytest.mark.parametrize(("dtype", "code"), [(np.int32, "I32"), (np.float64, "F64"), (np.uint8, "U8"), (bool, "BOOL")])
def test_wrong_dtype(folder, dtype, code):
    change(folder, ln_f__bias=np.zeros(24, dtype))
    fails(folder, rf"ln_f\.bias in model\.safetensors: expected float32, bfloat16, float16, got {code}")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda data: data + b"\0"]
)
def test_truncated_or_corrupt_file(folder, damage):
    (folder / FILE).write_bytes(damage((folder / FILE).read_bytes()))
    fails(folder, r"model\.safetensors: expected a whole safetensors file, got none \(", "download it again")


def test_page_in_place_of_the_file(folder):
    (folder / FILE).write_text("<html>404 Not Found</html>")
    fails(folder, r"expected a whole safetensors file, got none \((header too large|HeaderTooLarge)\)")


def test_git_lfs_pointer_in_place_of_the_file(folder):
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails(folder, "a git-lfs pointer; run `git lfs pull`")


def test_directory_in_place_of_the_file(folder):
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    fails(folder, r"model\.safetensors: expected a regular file, got a directory")


def test_one_tensor_under_two_names(folder):
    change(folder, transformer__ln_f__bias=np.zeros(24, np.float32))
    fails(
        folder, r"ln_f\.bias: expected to be stored once, got it in model\.safetensors as .* and model\.safetensors as"
    )


def test_tied_model_with_another_output_projection(folder):
    change(folder, lm_head__weight=np.zeros((11, 24), np.float32))
    fails(
        folder, r"lm_head\.weight in model\.safetensors: expected a copy of wte\.weight", "tie_word_embeddings to false"
    )
    change(folder, lm_head__weight=np.zeros((12, 24), np.float32))
    fails(folder, r"lm_head\.weight in model\.safetensors: expected a copy of wte\.weight")


def test_index_with_a_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    fails(sharded, r"model-00002-of-00003\.safetensors: missing, though model\.safetensors\.index\.json names it")


def test_index_with_a_tensor_that_its_shard_lacks(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    held = weight_map["ln_f.bias"]
    other = next(shard for shard in shards if shard != held)
    write_index(sharded, {**weight_map, "ln_f.bias": other})
    fails(sharded, rf"ln_f\.bias: expected in {other}, as model\.safetensors\.index\.json says, but it is not there")


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*"))[:2]
    copy = load_file(first) | {"ln_f.bias": np.zeros(24, np.float32)}
    save_file(copy, first)
    save_file(load_file(second) | {"ln_f.bias": np.zeros(24, np.float32)}, second)
    fails(sharded, rf"ln_f\.bias: expected to be stored once, got it in {first.name} as ln_f\.bias and {second.name}")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", 3, None])
def test_index_that_points_elsewhere(sharded, shard):
    write_index(sharded, {"ln_f.bias": shard})
    fails(sharded, r"index\.json: expected names of files in its directory, got ")


@pytest.mark.parametrize("weight_map", [None, {}, ["model.safetensors"]])
def test_index_without_a_weight_map(sharded, weight_map):
    write_index(sharded, weight_map)
    fails(sharded, r"index\.json: expected a weight_map")


def test_truncated_shard(sharded):
    path = sorted(sharded.glob("model-*"))[2]
    path.write_bytes(path.read_bytes()[:-4])
    fails(sharded, rf"{path.name}: expected a whole safetensors file")


def test_a_single_file_comes_before_an_index(sharded):
    synth.write(CONFIG, synth.synth(CONFIG, 0), sharded)
    assert {entry.path.name for entry in find_tensors(sharded).values()} == {FILE}


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_files_are_the_librarys_own(tmp_path, dtype):
    tensors = {
        name: np.random.default_rng(0).normal(size=n).astype(DTYPES[dtype]) for name, n in (("a", (3, 5)), ("b", 7))
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    forms = {name: (shape, dtype) for name, shape in shapes.items()}
    write_tensors(tmp_path / "ours", forms, tensors.__getitem__, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_value_that_overflows_is_an_error():
    for dtype, largest in (("float16", 1e5), ("bfloat16", np.float32(3.4e38))):
        values = np.array([1.0, -largest, 1e-30], np.float32)
        with pytest.raises(
            CheckpointError, match=rf"^w: expected values that fit {dtype}, got {re.escape(f'{largest:.6g}')}; use"
        ):
            cast(values, DTYPES[dtype], "w")
    assert cast(np.array([1e5], np.float32), DTYPES["bfloat16"], "w").dtype == jnp.bfloat16
    np.testing.assert_array_equal(cast(np.array([1e-30], np.float32), DTYPES["float16"], "w"), np.zeros(1, np.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_finite_or_refused_wherever_they_stand(dtype):
    size = (1 << 16) + 77  # more than one chunk
    largest = np.finfo(np.float32).max if dtype == "float32" else float(jnp.finfo(dtype).max)
    array = np.full((size, 2), largest, DTYPES[dtype])
    for view in (array, array.T):
        assert cast(view, DTYPES[dtype], "w") is view
    assert cast(array[:0], DTYPES[dtype], "w").size == 0
    for place in ((0, 0), (size - 1, 1)):
        for bad in (np.nan, -np.inf):
            broken = array.copy()
            broken[place] = bad
            with pytest.raises(CheckpointError, match=rf"^w: expected finite weights, got {bad} at \[{place[0]}, "):
                cast(broken, DTYPES[dtype], "w")
            with pytest.raises(CheckpointError, match=rf"^w: expected finite weights, got {bad} at \[{place[1]}, "):
                cast(broken.T, DTYPES[dtype], "w")


def replace(directory, names, error=None):
    """Writes the files with "new" in them, as one replacement that fails with `error` at the end."""
    with replacing_files(directory, last="last") as folder:
        for name in names:
            (folder / name).write_text("new")
        if error is not None:
            raise error


def test_files_are_replaced_all_or_none(tmp_path):
    def contents():
        return {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}

    for name in ("a", "last"):
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyError):
        replace(tmp_path, ["a"], KeyError())
    assert contents() == {"a": "old", "last": "old"}
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match=r"b: expected a regular file, got a directory"):
        replace(tmp_path, ["a", "b", "last"])
    assert contents() == {"a": "old", "last": "old"}
    replace(tmp_path, ["a", "last"])
    assert contents() == {"a": "new", "last": "new"}
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "last"]


def test_a_new_directory_disappears_on_failure(tmp_path):
    with pytest.raises(CheckpointError, match=r"new: cannot be written \(No space left on device\)"):
        replace(tmp_path / "new", ["a"], OSError(28, "No space left on device"))
    assert os.listdir(tmp_path) == []
