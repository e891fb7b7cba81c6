"""The cost model of many hosts: its parts by hand, its fit, and that its tables and its plot are made."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import llorch_jax as lj
from benchmarks import scaling, scaling_local
from benchmarks import scaling_model as model
from benchmarks.limits import step_bytes
from benchmarks.scaling_counts import Case, by_formula
from benchmarks.scaling_model import Network, Plan

SMALL = lj.GPT2Config(vocab_size=40, n_positions=64, n_embd=24, n_layer=4, n_head=4, num_kv_heads=2)
ROUND = model.Host("round", bandwidth=1e6, block=0.01, call=0.5, few=1e30, many=1e30, hidden=1.0, memory=1e9)
RING, BEST = Network("ring", 1.0, 100.0, True), Network("best", 1.0, 100.0, False)


def test_a_step_reads_the_bytes_of_the_benchmarks_floor():
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), lj.param_shapes(SMALL))
    assert model.read_bytes(SMALL, 3, 10) == step_bytes(SMALL, params, 3, 10)


def test_all_reduces_by_hand():
    assert model.all_reduce(BEST, 1, 1e9) == 0
    assert model.all_reduce(RING, 8, 800.0) == pytest.approx(14 * (1 + 1))
    assert model.all_reduce(BEST, 8, 80.0) == pytest.approx(3 * 1.8)  # doubling
    assert model.all_reduce(BEST, 8, 8000.0) == pytest.approx(14 * (1 + 10))  # a ring after all


def test_a_spread_step_by_hand():
    plan = Plan(data=3, tensor=2, stages=2)
    reading = model.read_bytes(SMALL, 5, 10, tensor=2) / 1e6 + 4 * 0.01
    added = 2 * 4 * model.all_reduce(RING, 2, 4 * 24 * 5)
    handed_on = 2 * (1 + 4 * 24 * 5 / 100)
    expected = reading + added + handed_on + 2 * 0.5
    assert model.token_seconds(ROUND, RING, SMALL, plan, 5, 10) == pytest.approx(expected)
    busy = model.tokens_per_second(ROUND, RING, SMALL, plan, 5, 10, "float32")
    assert busy == pytest.approx(3 * 2 * 5 / expected)


def test_the_fullest_host_of_one_copy_holds_what_the_compiled_step_holds():
    held = model.held_bytes(SMALL, Plan(1, 2, 1), 3, 16, "float32")
    assert held == by_formula(Case(SMALL, 2, 3, 16)).held - 2 * 4 * 3  # lengths and tokens


def test_plans_fit_the_heads_the_blocks_and_the_memory():
    found = model.plans(ROUND, SMALL, 8, 1, 16, "float32")
    assert {(plan.tensor, plan.stages) for plan in found} == {
        (t, s) for t in (1, 2, 4) for s in (1, 2, 4) if t * s <= 8
    }
    assert all(plan.data == 8 // (plan.tensor * plan.stages) for plan in found)
    whole = model.held_bytes(SMALL, Plan(1, 1, 1), 1, 16, "float32")
    tight = dataclasses.replace(ROUND, memory=whole - 1)
    assert all(plan.tensor * plan.stages > 1 for plan in model.plans(tight, SMALL, 8, 1, 16, "float32"))


def test_the_fit_is_near_the_figures_of_one_device():
    for line in scaling.check_fit(model.fit()):
        within = 0.35 if "not fitted" in line["name"] else 0.2
        assert line["modelled"] == pytest.approx(line["measured"], rel=within), line["name"]


def test_devices_that_share_a_memory_read_what_is_whole_once_each():
    config = scaling_local.preset_config("tiny")
    capacity = config.n_positions  # fewer than the benchmark asks for
    bytes_of_one = model.read_bytes(config, 1, capacity)
    bytes_of_two = 2 * model.read_bytes(config, 1, capacity, tensor=2)
    expected = 10.0 * bytes_of_two / bytes_of_one + 2 * 0.25
    assert scaling_local.predicted_ms("tiny", 2, 10.0, 0.25) == pytest.approx(expected)


def test_tables_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scaling.main(["--hosts", "1,32", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    figures = json.loads((tmp_path / "a.json").read_text())
    assert "70B-shaped" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    rows = {(line["host"], line["network"], line["name"], line["hosts"]): line for line in figures["rows"]}
    small, large = dict.fromkeys(line["host"] for line in figures["rows"])
    network = model.NETWORKS[-1].name
    assert (small, network, "70B-shaped", 1) not in rows  # 138 GB do not fit
    assert rows[large, network, "70B-shaped", 32]["ms"] < rows[large, network, "70B-shaped", 1]["ms"] / 10
