"""Models from the hub: what is a hub id, the cache, and errors. No test reaches the network."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import synth
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from llorch_jax.errors import CheckpointError
from llorch_jax.loading.checkpoint import load
from llorch_jax.loading.hub import PATTERNS, download, is_repo_id

CONFIG = {"vocab_size": 11, "n_positions": 7, "n_embd": 24, "n_layer": 2, "n_head": 4}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, in offline mode."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def store(cache, repo_id):
    """Puts a repository into the cache; returns the folder of its one snapshot."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    synth.write(CONFIG, synth.synth(CONFIG, 0), snapshot)
    return snapshot


def answer(monkeypatch, result):
    """Makes the client return or raise `result`; the keyword arguments it was called with are collected."""
    calls = []

    def snapshot_download(repo_id, **settings):
        calls.append({"repo_id": repo_id, **settings})
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def http_error(kind, message="404 Client Error. (Request ID: abc)\n\nNot Found for url: ..."):
    return kind(message, response=SimpleNamespace(headers={}, request=None))


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("source", ["gpt2", "openai-community/gpt2", "distilbert/distilgpt2", "a.b/c_d-e.f"])
def test_hub_ids(source):
    assert is_repo_id(source)


PATHS = (
    "",
    ".",
    "..",
    "./gpt2",
    "../gpt2",
    "/gpt2",
    "~/gpt2",
    "gpt2/",
    "a/b/c",
    "a//b",
    "a b",
    "a\\b",
    "C:/gpt2",
    "gpt2\n",
)
FILES = ("model.safetensors", "owner/config.json", "é", Path("gpt2"))


@pytest.mark.parametrize("source", [*PATHS, *FILES])
def test_paths_are_no_hub_ids(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_repo_id(source)
    calls = answer(monkeypatch, AssertionError("asked the hub"))
    with pytest.raises(CheckpointError):
        load(source)
    assert not calls


def test_a_name_below_an_existing_directory_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repo_id("models/gpt2")
    (tmp_path / "models").mkdir()
    assert not is_repo_id("models/gpt2")
    with pytest.raises(CheckpointError, match=r"source: expected .*; 'models/gpt2' is no such directory$"):
        load("models/gpt2")


def test_a_directory_comes_before_the_hub(tmp_path, monkeypatch):
    calls = answer(monkeypatch, AssertionError("asked the hub"))
    synth.write(CONFIG, synth.synth(CONFIG, 0), tmp_path / "owner" / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert load("owner/gpt2").name == "gpt2"
    assert not calls


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_model_loads_offline(cache, revision):
    snapshot = store(cache, "owner/gpt2")
    model = load("owner/gpt2", revision=revision)
    assert (model.name, model.directory) == ("owner/gpt2", snapshot)
    np.testing.assert_array_equal(model.params.wte, synth.synth(CONFIG, 0)["wte.weight"])


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    synth.write(CONFIG, synth.synth(CONFIG, 0), tmp_path)
    calls = answer(monkeypatch, tmp_path)
    assert download("owner/gpt2", "v1") == tmp_path
    assert calls == [{"repo_id": "owner/gpt2", "revision": "v1", "allow_patterns": list(PATTERNS)}]
    wanted = ["config.json", "merges.txt", "model.safetensors", "tokenizer.json", "vocab.json"]
    wanted += ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    others = [
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "README.md",
        "onnx/model.safetensors",
        "64.tflite",
    ]
    assert sorted(filter_repo_objects(wanted + others, allow_patterns=list(PATTERNS))) == sorted(wanted)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.HFValidationError("Repo id must ...\nmore"), r"expected a directory or a hub id such as"),
        (
            http_error(errors.RepositoryNotFoundError),
            r"or a public repository on the hub, found neither; check the name$",
        ),
        (http_error(errors.GatedRepoError), r"access is restricted; .* `hf auth login`$"),
        (
            http_error(errors.RevisionNotFoundError),
            r"expected a branch, tag or commit of the repository, got revision 'v9'$",
        ),
        (
            errors.LocalEntryNotFoundError("no\nway"),
            r"found neither, and the hub cannot be reached; check the network$",
        ),
        (
            caused(errors.LocalEntryNotFoundError("no"), errors.OfflineModeIsEnabled("offline")),
            r"found neither, and HF_HUB_OFFLINE forbids downloading; unset it$",
        ),
        (errors.OfflineModeIsEnabled("Cannot reach ..."), r"HF_HUB_OFFLINE forbids downloading; unset it$"),
        (
            http_error(errors.HfHubHTTPError, "500 Server Error\nbody"),
            r"failed \(HfHubHTTPError: 500 Server Error\); check",
        ),
        (OSError(28, "No space left on device"), r"failed \(OSError: \[Errno 28\] No space left on device\); check"),
        (RuntimeError(), r"failed \(RuntimeError: \); check the network and try again$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_are_one_line_on_what_to_do(monkeypatch, error, message):
    answer(monkeypatch, error)
    with pytest.raises(CheckpointError, match=r"^owner/gpt2: .*" + message) as caught:
        load("owner/gpt2", revision="v9")
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_offline_without_the_model(cache):
    for name in ("owner/gpt2", "gpt2"):
        with pytest.raises(CheckpointError, match=rf"^{name}: .* HF_HUB_OFFLINE forbids downloading; unset it$"):
            load(name)


def test_no_network(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(CheckpointError, match=r"^owner/gpt2: .* the hub cannot be reached; check the network$"):
        load("owner/gpt2")
    store(cache, "owner/gpt2")
    assert load("owner/gpt2").name == "owner/gpt2"


def test_a_repository_without_safetensors(cache):
    (store(cache, "owner/gpt2") / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^owner/gpt2: expected model\.safetensors or .*never loaded"):
        load("owner/gpt2")


def test_the_client_is_imported_only_when_needed():
    code = "import sys, llorch_jax.loading.checkpoint; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
