"""Measurements of speed: what is counted, and what is refused."""

import pytest
import tiny

import llorch_jax as lj
from llorch_jax.evaluation import speed
from llorch_jax.evaluation.speed import Speed, measure_speed


@pytest.fixture(scope="module")
def model():
    return tiny.random_model()


def test_measures_every_repeat_and_leaves_out_compiling(model, monkeypatch):
    found = measure_speed(model, batch=2, prompt_tokens=8, new_tokens=4, repeats=3, cache="dynamic")
    assert (found.batch, found.prompt_tokens, found.new_tokens) == (2, 8, 4)
    assert (len(found.prefill), len(found.step)) == (3, 3)
    assert min(*found.prefill, *found.step) > 0


def test_laps_are_counted_as_prefill_and_per_step(model, monkeypatch):
    class Watch:
        compile = 7.0
        laps = iter([0.0, 9.0, 9.0, 0.0, 0.5, 0.6, 0.0, 0.7, 0.9])

        def lap(self):
            return next(self.laps)

    monkeypatch.setattr(speed, "Stopwatch", Watch)
    found = measure_speed(model, prompt_tokens=8, new_tokens=4, repeats=2)
    assert found == Speed(1, 8, 4, 7.0, (0.5, 0.7), (pytest.approx(0.2), pytest.approx(0.3)))
    assert found.prefill_tokens_per_second == pytest.approx(8 / 0.6)
    assert found.decode_tokens_per_second == pytest.approx(4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "batch: expected a whole number"),
        ({"new_tokens": 1}, "new_tokens: expected a whole number in 2"),
        ({"repeats": 0}, "repeats"),
        ({"prompt_tokens": 64, "new_tokens": 2}, "n_positions=64 per row, got 65"),
        ({"cache": "nonsense", "new_tokens": 2, "prompt_tokens": 2}, "nonsense"),
    ],
)
def test_refuses_what_cannot_be_measured(model, given, message):
    with pytest.raises(lj.LlorchError, match=message):
        measure_speed(model, **given)
