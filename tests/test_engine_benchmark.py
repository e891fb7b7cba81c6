"""The engine's benchmark: its trace is always the same, its figures are those of known times."""

import pytest
from profiles import THOROUGH

import llorch_jax as lj
from benchmarks import engine

CONFIG = lj.GPT2Config(vocab_size=97, n_positions=64, n_embd=8, n_layer=1, n_head=1)


def test_a_trace_depends_on_its_seed_only_and_fits_the_context():
    first, second, other = (engine.trace(CONFIG, 30, 5.0, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert all(len(each.prompt) + each.new - 1 <= CONFIG.n_positions for each in first)
    assert [each.at for each in first] == sorted(each.at for each in first)
    assert 30 / first[-1].at == pytest.approx(5.0, rel=0.5)


def test_figures_of_known_times():
    times = [
        engine.Times(engine.Arrival(1.0, [1], 3), [1.5, 1.75, 2.0]),
        engine.Times(engine.Arrival(2.0, [1], 2), [2.25, 3.0]),
    ]
    found = engine.summary(times)
    assert found["tokens_per_second"] == pytest.approx(5 / 2.0)
    assert found["first_token_ms"]["p50"] == pytest.approx(375.0)
    assert found["between_tokens_ms"]["p50"] == pytest.approx(250.0)
    assert found["between_tokens_ms"]["p99"] == pytest.approx(740.0)


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.engine_plot import plot

    latencies = {"p50": 1.0, "p95": 20.0, "p99": 300.0}
    rows = [{"name": name, "first_token_ms": latencies, "between_tokens_ms": latencies} for name in "abc"]
    prefix = {"tokens": 512, "computed": 300.0, "cached": 9.0, "restored": 30.0}
    setting = {"preset": "tiny", "requests": 3, "rate": 1.5, "slots": 2}
    plot({"setting": setting, "rows": rows, "prefix_hit_ms": prefix}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not THOROUGH, reason="compiles for a minute; LLORCH_TESTS=thorough runs it")
def test_it_runs_on_a_tiny_model(capsys):
    figures = engine.measure("tiny", 6, 30.0, 2, 1)
    assert [row["name"] for row in figures["rows"]] == ["engine", "one at a time", "static batches"]
    engine.show(figures)
    said = capsys.readouterr().out
    assert "if it is in the second pool" in said
    assert "x generate_tokens" in said
