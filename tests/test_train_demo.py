"""The training script of the demo model, at a size that takes seconds."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llorch_jax as lj

SCRIPT = Path(__file__).parent.parent / "tools" / "train_demo.py"
STORIES = [f"Once upon a time there were {n} foxes, and each of the {n} foxes had a friend." for n in range(40)]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_demo", module)
    spec.loader.exec_module(module)
    config = lj.GPT2Config(
        vocab_size=300, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    for name, value in {"CONFIG": config, "LENGTH": 8, "BATCH": 2, "WARMUP": 2}.items():
        monkeypatch.setattr(module, name, value)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax needs both
        yield module


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "tales.txt"
    path.write_text("\n\n".join(STORIES))
    return path


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_demo.py", *map(str, arguments)])
    script.main()


def test_train_resume_and_export(script, corpus, tmp_path, monkeypatch):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    run(script, monkeypatch, "train", corpus, corpus, whole, "--steps", "6", "--every", "3")
    batches = script.batches

    def fail_at_step_four(ids, step):
        if step == 4:
            raise KeyboardInterrupt
        return batches(ids, step)

    monkeypatch.setattr(script, "batches", fail_at_step_four)
    with pytest.raises(KeyboardInterrupt):
        run(script, monkeypatch, "train", corpus, corpus, interrupted, "--steps", "6", "--every", "3")
    monkeypatch.setattr(script, "batches", batches)
    run(script, monkeypatch, "train", corpus, corpus, interrupted, "--steps", "6", "--every", "3")
    for a, b in zip(*(jax.tree.leaves(script.restore(f)["params"]) for f in (whole, interrupted)), strict=True):
        np.testing.assert_array_equal(a, b)
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [3, 6]
    assert log[1]["heldout"] < log[0]["heldout"] < np.log(300) + 0.1
    assert (whole / "loss.png").stat().st_size > 1000

    run(script, monkeypatch, "export", whole, corpus, tmp_path / "model")
    model = lj.load(tmp_path / "model")
    total = sum(lj.score(model, story).total for story in STORIES)
    bits = -total / np.log(2) / sum(len(story) for story in STORIES)
    assert f"{bits:.3f} bits per byte" in (tmp_path / "model" / "README.md").read_text()


def test_every_token_of_an_epoch_is_seen_once(script):
    ids = np.arange(8 * 2 * 10 + 16, dtype=np.int32)
    windows = np.concatenate([script.batches(ids, step) for step in range(10)])
    assert windows.shape == (20, 9)
    inputs = np.sort(windows[:, :-1].ravel())
    np.testing.assert_array_equal(inputs, np.arange(inputs[0], inputs[0] + 160))
    assert not np.array_equal(windows, np.concatenate([script.batches(ids, step) for step in range(10, 20)]))


def test_schedule(script):
    rates = [script.schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.5
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(1 / 35)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
