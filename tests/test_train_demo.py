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
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_demo", module)
    spec.loader.exec_module(module)
    config = lj.GPT2Config(
        vocab_size=300, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    for name, value in {"CONFIG": config, "LENGTH": 8, "BATCH": 2, "WARMUP": 2, "PLAIN_WINDOWS": 1}.items():
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

    def fail_at_step_four(ids, step, count, length):
        if step == 4:
            raise KeyboardInterrupt
        return batches(ids, step, count, length)

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

    run(script, monkeypatch, "export", whole, corpus, tmp_path / "model", "--card", SCRIPT.parent / "demo_card.md")
    model = lj.load(tmp_path / "model")
    total = sum(lj.score(model, story).total for story in STORIES)
    bits = -total / np.log(2) / sum(len(story) for story in STORIES)
    assert f"{bits:.3f} bits per byte" in (tmp_path / "model" / "README.md").read_text()


def test_every_token_of_an_epoch_is_seen_once(script):
    ids = np.arange(8 * 2 * 10 + 16, dtype=np.int32)
    windows = np.concatenate([script.batches(ids, step, 2, 8) for step in range(10)])
    assert windows.shape == (20, 9)
    inputs = np.sort(windows[:, :-1].ravel())
    np.testing.assert_array_equal(inputs, np.arange(inputs[0], inputs[0] + 160))
    assert not np.array_equal(windows, np.concatenate([script.batches(ids, step, 2, 8) for step in range(10, 20)]))


def test_a_grown_model_is_the_same_function(script):
    config = lj.GPT2Config(vocab_size=300, n_positions=8, n_embd=16, n_layer=3, n_head=2)
    params = lj.init_params(config, jax.random.key(1))
    windows = np.random.default_rng(0).integers(0, 300, (2, 9))
    grown = script.grow(params, 5)
    assert len(grown.blocks) == 5
    np.testing.assert_allclose(script.token_losses(grown, windows), script.token_losses(params, windows), atol=1e-5)
    same = script.grow(params, 3)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, same)), strict=True))


def test_bits_per_byte_of_the_beginning_of_a_story(script, tmp_path):
    stories = [*STORIES, "Foxes.", "Two f\u00f4xes."]
    tokenizer = script.train_tokenizer(stories, tmp_path / "tokenizer.json", 300)
    params = script.new_params(1)
    found = script.bits_per_byte(params, tokenizer, stories)
    for story, bits in zip(stories, found, strict=True):
        encoding = tokenizer.encode(story)
        ids = np.array([[0, *encoding.ids][:9]])
        text = story[: encoding.offsets[min(8, len(encoding.ids)) - 1][1]]
        expected = script.token_losses(params, ids).sum() / np.log(2) / len(text.encode())
        assert bits == pytest.approx(float(expected), rel=1e-5)


def test_a_second_run_prefers_what_the_first_finds_plain(script, tmp_path, monkeypatch):
    corpus, first, model, second = (tmp_path / name for name in ("tales.txt", "first", "model", "second"))
    strange = [" ".join(np.random.default_rng(n).permutation(list("abcdefghijklmnopqrstuvwxyz"))) for n in range(40)]
    corpus.write_text("\n\n".join(itertools.chain(*zip(STORIES, strange, strict=True))))
    run(script, monkeypatch, "train", corpus, corpus, first, "--layers", "1", "--steps", "40")
    run(script, monkeypatch, "export", first, corpus, model)
    assert not (model / "README.md").exists()
    given = ("--layers", "2", "--start", model, "--plainest", "0.5", "--steps", "4")
    run(script, monkeypatch, "train", corpus, corpus, second, *given)
    plain = json.loads((second / "plainest.json").read_text())
    assert plain
    assert set(plain) <= set(STORIES)
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    trained = script.restore(second)
    assert len(trained["params"].blocks) == 2
    run(script, monkeypatch, "export", second, corpus, tmp_path / "mean", "--average", model)
    averaged, start = lj.load(tmp_path / "mean").params, script.grow(lj.load(model).params, 2)
    for a, b, c in zip(*map(jax.tree.leaves, (averaged, start, trained["params"])), strict=True):
        np.testing.assert_allclose(a, (b + c) / 2, atol=1e-3)
    assert trained["step"] == 4


@pytest.mark.parametrize("given", [("--plainest", "0.5"), ("--plainest", "0", "--start", "x")])
def test_an_impossible_preference_is_refused(script, corpus, tmp_path, monkeypatch, capsys, given):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "train", corpus, corpus, tmp_path / "work", *given)
    assert "--plainest: expected" in capsys.readouterr().err


def test_a_model_is_not_grown_to_fewer_blocks(script):
    with pytest.raises(SystemExit, match="at least the model's 3 blocks, got 2"):
        script.grow(script.new_params(3), 2)


def test_schedule(script):
    rates = [script.schedule(step, 100, 0.35) for step in range(100)]
    assert rates[0] == 0.5
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(1 / 35)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
