"""Requests in the engine get the tokens that they would get alone, whatever happens to them on the way."""

import time

import jax
import numpy as np
import pytest
from cache_cases import make_config
from cores import Answer, alone, make_core, request, run
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples, some
from tiny import random_params

import llorch_jax as lj
from llorch_jax.engine import device
from llorch_jax.engine import slots as programs
from llorch_jax.errors import EngineError, NonFiniteError

CONFIG = make_config(layers=2, heads=2, head_dim=8)
SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 1.1, "top_k": 5},
    {"temperature": 0.8, "repetition_penalty": 1.3, "min_new_tokens": 3},
    {"temperature": 0.7, "top_p": 0.9, "dry_multiplier": 0.8},
)
BEGINNING = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 16).tolist()


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def core(params):
    """Pages for two of the longest requests, and a bit: they run out."""
    return make_core(params, CONFIG, slots=2, num_pages=18)


jobs = st.lists(
    st.fixed_dictionaries(
        {
            "shared": st.integers(0, 16),
            "own": st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=10),
            "new": st.integers(1, 14),
            "settings": st.sampled_from(SETTINGS),
            "ends": st.sampled_from([(), (3, 7)]),
            "priority": st.integers(0, 1),
            "after": st.integers(0, 6),
            "stop_after": st.sampled_from([None, None, None, 2]),
        }
    ),
    min_size=1,
    max_size=6,
)


@examples(5)
@given(jobs=jobs)
def test_tokens_are_those_of_each_request_alone(params, core, jobs):
    """Greedy and drawn, beside others, with cached beginnings, preempted or not, whatever the order."""
    answers = []
    for number, job in enumerate(jobs):
        answer = Answer(job["stop_after"])
        prompt = BEGINNING[: job["shared"]] + job["own"]
        given_request = request(
            prompt,
            job["new"],
            answer,
            seed=number,
            settings=job["settings"],
            eos_ids=job["ends"],
            priority=job["priority"],
        )
        core.check(given_request)
        core.add(given_request)
        answers.append((answer, prompt))
        for _ in range(job["after"]):
            core.step()
            core.pages.check(core.held())
    run(core)
    for number, (job, (answer, prompt)) in enumerate(zip(jobs, answers, strict=True)):
        expected = alone(params, CONFIG, prompt, job["new"], seed=number, settings=job["settings"], eos_ids=job["ends"])
        assert answer.error is None
        assert answer.tokens == expected[: job["stop_after"]]


def submit(core, prompt, new, **more):
    answer = Answer(more.pop("stop_after", None))
    return answer, core.add(request(prompt, new, answer, **more))


def test_pages_that_run_out_preempt_and_the_tokens_stay_the_same(params, core):
    before = core.statistics.preemptions
    answers = [submit(core, [1 + n] * 20, 20)[0] for n in range(2)]
    run(core)
    assert core.statistics.preemptions > before
    for number, answer in enumerate(answers):
        assert answer.tokens == alone(params, CONFIG, [1 + number] * 20, 20)


def test_a_request_finds_the_pages_of_one_that_still_runs(core):
    prompt = list(range(40, 57))
    first, _ = submit(core, prompt, 12)
    for _ in range(4):
        core.step()
    assert not first.over
    second, sequence = submit(core, prompt, 2)
    core.step()
    assert sequence.cached == 16
    assert core.pages.counts().shared == 4
    run(core)
    assert second.tokens == first.tokens[:2]


def test_new_settings_compile_nothing_after_a_first_round(core):
    def round_of(settings):
        for number, each in enumerate(settings):
            submit(core, [5, 6, 7 + number], 4, settings=each, seed=number, eos_ids=(1, 2))
        run(core)

    round_of([{"temperature": 0.0}] * 3)
    count = device.compile_count()
    round_of(
        [*SETTINGS, {"temperature": 1.0, "logit_bias": {3: -5.0}, "bad_words": [[4], [5, 6]], "xtc_probability": 0.5}]
    )
    assert device.compile_count() == count


def test_a_cancelled_request_frees_its_pages_at_once(core):
    answer, sequence = submit(core, [9] * 9, 30)
    for _ in range(4):
        core.step()
    core.withdraw(sequence)
    assert core.pages.counts().held == 0
    run(core)
    assert isinstance(answer.error, EngineError)
    assert not answer.over or len(answer.tokens) < 30


def test_a_request_past_its_deadline_is_given_up(core):
    answer, _ = submit(core, [9] * 9, 30, deadline=time.monotonic() + 0.05)
    other, _ = submit(core, [8] * 3, 3)
    time.sleep(0.06)
    run(core)
    assert "deadline" in str(answer.error)
    assert len(other.tokens) == 3


def test_an_error_of_one_request_leaves_the_others_alone(params, core):
    """Settings that exclude every token, and a reader that raises."""
    excluded, _ = submit(core, [5], 4, settings={"temperature": 1.0, "logit_bias": dict.fromkeys(range(97), -np.inf)})
    answer, _ = submit(core, [5, 6], 4)
    broken = Answer()
    broken.on_token = lambda token: 1 / 0
    core.add(request([5, 6, 7], 4, broken))
    run(core)
    assert isinstance(excluded.error, lj.SamplerError)
    assert isinstance(broken.error, ZeroDivisionError)
    assert answer.tokens == alone(params, CONFIG, [5, 6], 4)


def test_a_step_that_fails_fails_only_its_requests(params, core, monkeypatch):
    running, _ = submit(core, [5, 6], 12)
    for _ in range(3):
        core.step()
    doomed, _ = submit(core, [3] * 9, 4)

    def fails(*args, **more):
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr(programs, "prefill", fails)
    run(core)
    assert isinstance(doomed.error, EngineError)
    assert "no memory" in str(doomed.error)
    assert running.tokens == alone(params, CONFIG, [5, 6], 12)
    assert core.statistics.failures == 1


def test_weights_that_are_not_numbers_are_reported(params):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    core = make_core(broken, CONFIG, slots=2, num_pages=18)
    answer, _ = submit(core, [5], 4)
    run(core)
    assert isinstance(answer.error, NonFiniteError)


@pytest.mark.parametrize("new", [1, 2])
def test_a_context_can_be_filled_to_the_last_token(params, core, new):
    prompt = [n % 97 for n in range(CONFIG.n_positions + 1 - new)]
    answer, sequence = submit(core, prompt, new)
    core.check(sequence.request)
    run(core)
    assert answer.tokens == alone(params, CONFIG, prompt, new)
    with pytest.raises(lj.CapacityError, match=r"within the context of 64, got \d+ and 65 tokens"):
        core.check(request(prompt, 65, answer))


def test_a_request_that_needs_more_pages_than_there_are_is_refused(params):
    core = make_core(params, CONFIG, slots=1, num_pages=3)
    with pytest.raises(lj.CapacityError, match="expected an engine with 4 pages"):
        core.check(request([1] * 10, 6, Answer()))


def test_alternatives_are_recorded_for_those_who_ask(core):
    plain, _ = submit(core, [5, 6], 3)
    asking, _ = submit(core, [5, 6, 7], 3, top_logprobs=2)
    run(core)
    assert plain.last.top is None
    (first, high), (_, low) = asking.last.top
    assert first == asking.last.id
    assert high == pytest.approx(asking.last.logprob, abs=1e-5)
    assert high >= low


@pytest.mark.parametrize("codec", some(["int8", "bfloat16"], 1))
def test_other_codecs_give_what_a_paged_cache_of_theirs_gives(params, codec):
    core = make_core(params, CONFIG, slots=1, codec=codec)
    prompt = [4, 8, 15, 16, 23, 42]
    answer, _ = submit(core, prompt, 6)
    run(core)
    cache = lj.make_cache(CONFIG, "paged:4", codec=codec, residual=None if codec == "bfloat16" else 0)
    tokens, _ = lj.generate_tokens(params, CONFIG, np.array([prompt], np.int32), 6, cache=cache, eos_id=None)
    assert answer.tokens == np.asarray(tokens)[0].tolist()


def test_pages_outside_a_models_window_are_freed_while_a_request_runs():
    config = make_config(layers=1, heads=2, head_dim=4, sliding_window=8)
    params = random_params(config)
    core = make_core(params, config, slots=1, num_pages=16, idle_chunk=8)
    answer, sequence = submit(core, [3, 1, 4, 1, 5, 9, 2, 6] * 4, 16)
    most = 0
    while not core.idle:
        core.step()
        core.pages.check(core.held())
        most = max(most, len(sequence.held))
    assert most <= 5
    assert answer.tokens == alone(params, config, [3, 1, 4, 1, 5, 9, 2, 6] * 4, 16)
