"""The benchmarks run and report; their figures are not tested, on a model as small as this they mean nothing."""

import copy
import json
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import jax
import pytest

import llorch_jax as lj
from benchmarks import (
    batch,
    check,
    compare,
    decode,
    long_context,
    memory,
    prefill,
    profile_cache,
    sampling,
    startup,
    suite,
    weights,
)
from benchmarks import report as html_report
from benchmarks.__main__ import main as run_suite
from benchmarks.agreement import tell_agreement
from benchmarks.decoder import Decoder
from benchmarks.limits import kv_bytes, prefill_flops, step_bytes
from benchmarks.measure import Sample, interleaved, random_model
from benchmarks.peer_process import Peer, PeerError
from benchmarks.reports import row
from benchmarks.wording import QUICK, READING, number, words

FAKE = '''
"""A peer that follows a file of recorded tokens, and refuses one case."""
import json
from worker import serve

def load(directory, work, threads):
    recorded = json.loads(open({path!r}).read())
    def right(tokens, new):
        print("noise on stdout")
        if new == 4:
            raise NotImplementedError("four tokens")
        return [row[:new] for row in recorded]
    return {{"right": right, "wrong": lambda tokens, new: [[0] * new for _ in tokens]}}

serve(load, {{"right": "float32", "wrong": "int8"}}, ["pip"], lambda: "by hand")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module", autouse=True)
def hasty_compiling():
    with suite.hasty_compiling():
        yield


@pytest.fixture(scope="module")
def peer_script(folder):
    config, params = random_model("tiny")
    tokens = compare.random_tokens(config, 1, 16).tolist()
    expected = lj.generate_tokens(params, config, tokens, 8)[0].tolist()
    path = folder / "fake.py"
    (folder / "recorded.json").write_text(json.dumps(expected))
    path.write_text(FAKE.format(path=str(folder / "recorded.json")))
    return path


@pytest.fixture(scope="module")
def reports(folder, peer_script):
    """Reports of all benchmarks by name, each by its command line, at sizes that share compiled programs."""
    common = ["--preset", "tiny", "--rounds", "1", "--json"]
    commands = {
        decode: ["--prompt", "16", "--new", "16"],
        prefill: ["--prompts", "16"],
        batch: ["--prompt", "16", "--new", "16", "--batches", "1", "--layers", "1"],
        long_context: ["--lengths", "15,16", "--new", "16", "--layouts", "static"],
        startup: ["--prompt", "16", "--new", "8"],
        memory: ["--prompt", "16", "--new", "8", "--layouts", "static"],
        profile_cache: ["--lengths", "16", "--layouts", "static"],
    }
    found = {}
    for module, options in commands.items():
        name = module.__name__.rpartition(".")[2]
        path = folder / f"{name}.json"
        module.main([*common, str(path), *options])
        found[name] = json.loads(path.read_text())
    peers = {"fake": (sys.executable, peer_script)}
    found["compare"] = compare.measure("tiny", peers, [(1, 16, 8), (1, 16, 4)], 1)
    return found


def test_every_benchmark_reports_its_rows_with_ratios(reports):
    assert {name: len(figures["rows"]) for name, figures in reports.items()} == {
        "decode": 1,
        "prefill": 1,
        "batch": 2,
        "long_context": 2,
        "startup": 2,
        "memory": 1,
        "profile_cache": 1,
        "compare": 10,
    }
    for name, figures in reports.items():
        assert figures["benchmark"] == name
        for line in figures["rows"]:
            if name != "compare":  # its steps are differences, which may be anything on a model this small
                assert line["value"]["median"] > 0
                assert line["ratio"]["median"] > 0


def test_reports_tell_the_limits_of_the_machine(reports):
    for name in ("decode", "prefill", "batch", "long_context", "profile_cache", "compare"):
        limits = reports[name]["limits"]
        assert limits["bandwidth_gb_s"]["median"] > 0
        assert limits["gemm_gflop_s"]["median"] > 0


def test_floors():
    config, params = random_model("tiny")
    weights = sum(leaf.size for leaf in jax.tree.leaves((params.wte, params.blocks, params.ln_f)))
    assert kv_bytes(config) == 2 * 16 * 4
    assert step_bytes(config, params, 3, 10) == 4 * weights + 3 * 10 * 2 * 16 * 4
    # By hand: 12 D^2 of dense layers per token, 2 D (1 + 2 + 3) for scores and sums in all, one row of logits.
    assert prefill_flops(config, 1, 3) == 2 * (3 * 12 * 16**2 + 2 * 16 * (1 + 2 + 3) + 16 * 257)


def test_rounds_are_interleaved_and_the_first_is_not_kept():
    calls = []
    tasks = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"}
    assert interleaved(tasks, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert calls == ["a", "b", "a", "b", "a", "b"]


def test_ratios_are_taken_round_by_round():
    line = row("x", [2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert line["ratio"] == Sample(2.0, 1.0, 3.0)
    assert line["against"] == 2.0


def test_a_decoder_repeats_the_loop_of_generate_tokens(reports):
    config, params = random_model("tiny")
    cache = lj.StaticCache.init(config, capacity=32)
    decoder = Decoder(params, config, cache, 16, 16)
    expected = lj.generate_tokens(params, config, compare.random_tokens(config, 1, 16), 17)[0][0].tolist()
    for _ in range(2):
        decoder.step_ms()
        assert decoder.out.tokens[0, 1:17].tolist() == expected[1:]


def test_signals_have_todays_values(reports):
    found = reports["profile_cache"]["signals"]
    assert list(found) == ["performance", "features", "code", "requirements"]
    assert found["features"]["value"].startswith("6 strategies")
    assert found["code"]["on"]
    assert "saving and loading" in found["requirements"]["value"]


def test_peers_that_agree_are_timed_and_others_named(reports, capsys):
    lines = {(line["case"], line["contender"]): line for line in reports["compare"]["agreement"]}
    assert lines["1x16+8", "fake right"]["same"] == 8
    assert lines["1x16+8", "fake right"]["exact"]
    assert lines["1x16+8", "fake right"]["equal"] == lines["1x16+8", "fake right"]["rows"] == 1
    assert lines["1x16+8", "fake wrong"]["same"] < 8
    assert "four tokens" in lines["1x16+4", "fake right"]["error"]
    assert reports["compare"]["versions"].keys() == {"pip"}
    timed = {(line["case"], line["contender"]) for line in reports["compare"]["rows"]}
    assert timed == {key for key, line in lines.items() if "error" not in line}
    assert tell_agreement(reports["compare"]) == 0
    assert "left out (fake: NotImplementedError: four tokens)" in capsys.readouterr().out


def test_a_float32_peer_with_other_tokens_is_a_failure(reports, capsys):
    figures = copy.deepcopy(reports["compare"])
    line = next(line for line in figures["agreement"] if line["contender"] == "fake right")
    line.update(same=3, equal=0, wrong="row 0, token 3: expected a logit at most 2e-05 below the best one, got 0.1")
    assert tell_agreement(figures) == 1
    assert "0 of 1 rows agree; row 0, token 3: expected a logit" in capsys.readouterr().out


def test_a_peer_that_ends_is_reported(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text("import sys; sys.exit(3)")
    with Peer("ends", sys.executable, script) as peer, pytest.raises(PeerError, match="ends: ended with exit code 3"):
        peer.load(tmp_path, tmp_path, 1)


@pytest.mark.parametrize("text", ["other=python", "transformers", "transformers="])
def test_an_unknown_peer_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--peer", text])
    assert "expected NAME=PYTHON" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1x16", "0x16+8", "1x16+1", "x"])
def test_an_impossible_case_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--cases", text])
    assert "--cases" in capsys.readouterr().err


def test_peer_scripts_know_nothing_of_this_package():
    scripts = list((Path(compare.__file__).parent / "peers").glob("*.py"))
    assert len(scripts) == 6
    for script in scripts:
        assert "import llorch_jax" not in script.read_text()
        assert "from llorch_jax" not in script.read_text()


def test_check_finds_a_regression_beyond_the_spread(reports, tmp_path, capsys):
    baseline, run = tmp_path / "baseline.json", tmp_path / "run.json"
    baseline.write_text(json.dumps({"reports": [reports["decode"], reports["prefill"]]}))
    worse = copy.deepcopy(reports["decode"])
    worse["rows"][0]["ratio"] = {key: 1.5 * value for key, value in worse["rows"][0]["ratio"].items()}
    run.write_text(json.dumps({"reports": [worse, reports["prefill"]]}))
    common = ["--out", str(tmp_path), "--check", str(baseline)]
    assert run_suite([*common, "--run", str(run)]) == 1
    assert "worse: decode, decode step" in capsys.readouterr().out
    assert run_suite([*common, "--run", str(baseline)]) == 0


def test_check_compares_only_like_with_like(reports):
    other = copy.deepcopy(reports["decode"])
    other["setting"]["batch"] = 2
    other["rows"][0]["ratio"] = {"median": 99.0, "low": 99.0, "high": 99.0}
    assert check.regressions([reports["decode"]], [other]) == ([], 0)


@pytest.mark.parametrize(("low", "found"), [(1.21, 0), (1.23, 1)])
def test_the_spread_and_two_percent_are_no_regression(low, found):
    def run(ratio):
        return [{"benchmark": "x", "setting": {}, "rows": [{"name": "y", "ratio": ratio}]}]

    before, after = {"median": 1.1, "low": 1.0, "high": 1.2}, {"median": 1.4, "low": low, "high": 1.5}
    assert len(check.regressions(run(before), run(after))[0]) == found


@pytest.fixture(scope="module")
def page(reports, folder):
    """The report of all benchmarks, and its plots."""
    path = folder / "run.json"
    path.write_text(json.dumps({"reports": list(reports.values())}))
    html_report.main([str(path)])
    return (folder / "run" / "index.html").read_text(), sorted((folder / "run").glob("*.png"))


def test_the_report_shows_plots_in_the_section_of_their_benchmark(page, reports):
    text, plots = page
    sections = text.split("<h2>")[2:]
    assert [each.partition("<")[0] for each in sections] == [escape(words(name).title) for name in reports]
    expected = {"decode": 1, "prefill": 1, "batch": 2, "long_context": 1, "startup": 1, "memory": 1, "profile_cache": 1}
    expected["compare"] = 2
    for name, section in zip(reports, sections, strict=True):
        assert section.count("data:image/png;base64,") == expected[name]
        assert section.index("<img") < section.index("<table")
    assert len(plots) == sum(expected.values())
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert "http" not in text  # nothing is fetched


def test_the_report_says_what_it_shows_where_it_comes_from_and_that_a_quick_run_means_nothing(page, reports):
    text, _ = page
    machine = reports["decode"]["machine"]
    for said in (READING, QUICK, machine["commit"], machine["processor"], "name=viewport", "&nbsp;ms", "&nbsp;MB"):
        assert said in text
    real = copy.deepcopy(reports["decode"])
    real["setting"]["preset"] = "gpt2"
    assert QUICK not in html_report.render([real], {})


def test_the_report_has_no_key_in_place_of_a_name(page):
    text, _ = page
    shown = re.sub(r"<(style|code)>.*?</\1>|<[^>]*>", " ", text, flags=re.S)
    assert re.findall(r"\b[a-z]+_[a-z_]+\b", shown.replace("generate_tokens", "").replace("llorch_jax", "")) == []


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.4, "1,234")]
)
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


def test_the_suite_keeps_its_figures(tmp_path, reports):
    assert run_suite(["--quick", "--only", "decode,prefill", "--out", str(tmp_path)]) == 0
    (figures,) = tmp_path.glob("run-*.json")
    assert [each["benchmark"] for each in check.read_run(figures)] == ["decode", "prefill"]
    with pytest.raises(SystemExit):
        run_suite(["--only", "nothing"])


def test_help_needs_no_model():
    out = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], capture_output=True, text=True, check=True)
    assert "--check BASELINE.json" in out.stdout


def test_rounding_is_compared_with_exact_weights(capsys):
    weights.main(["--random", "tiny", "--rows", "1", "--length", "16", "--formats", "float32,float16,int4:64"])
    *_, exact, half, fours = capsys.readouterr().out.splitlines()
    kl = [float(line.split()[2]) for line in (exact, half, fours)]
    assert kl[0] == 0 < kl[1] < kl[2]


def test_sampling_is_compared_with_a_step(monkeypatch):
    chosen = {name: sampling.SETTINGS[name] for name in ("greedy", "repetition, top_k, top_p")}
    monkeypatch.setattr(sampling, "SETTINGS", chosen)
    figures = sampling.measure("tiny", 2, 20, 1)
    assert [row["name"] for row in figures["rows"]] == list(chosen)
    assert all(row["value"]["median"] > 0 for row in figures["rows"])


def test_a_comparison_whose_differences_are_negative_is_drawn(reports, tmp_path):
    figures = copy.deepcopy(reports["compare"])
    for line in figures["rows"]:
        line["time"] = {"median": -1.0, "low": -2.0, "high": -1.0}
    html_report.write_report([figures], tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 2
