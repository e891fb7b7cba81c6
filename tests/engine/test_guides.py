"""Requests with guides get the tokens that they would get alone, and their neighbours do not notice."""

import jax
import numpy as np
import pytest
from cache_cases import make_config
from cores import Answer, alone, make_core, request, run
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples, whole
from tiny import random_params

import llorch_jax as lj
from llorch_jax.decoding.guided import guided_steps
from llorch_jax.decoding.request import prepare
from llorch_jax.engine import device
from llorch_jax.engine import slots as programs
from llorch_jax.errors import ConstraintError, EngineError
from llorch_jax.sampling import make_sampler

CONFIG = make_config(layers=2, heads=2, head_dim=8)
VOCAB = CONFIG.vocab_size
SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 1.1, "top_k": 5},
    {"temperature": 0.8, "repetition_penalty": 1.3, "min_new_tokens": 3},
    {"temperature": 1.0, "logit_bias": dict.fromkeys(range(VOCAB), -np.inf)},  # over which the guide wins
)
BEGINNING = np.random.default_rng(0).integers(0, VOCAB, 16).tolist()


class Walk:
    """A guide for one text: after each token, every third id or so may come; the text is complete after some tokens.

    With `dead` tokens, nothing can follow, as where no token of a vocabulary spells what a grammar wants.
    """

    def __init__(self, salt, most, eos_ids=(), dead=None):
        self.complete = np.zeros(1, bool)
        self.insists = np.ones(1, bool)
        self.tokens = []
        self._salt = salt
        self._most = most
        self._eos_ids = eos_ids
        self._dead = dead
        self.fill()

    @property
    def allowed(self):
        last = self.tokens[-1] if self.tokens else 0
        return (np.arange(VOCAB) * 7 + last + self._salt) % 3 == 0

    def push(self, tokens, going):
        assert going.tolist() == [True]
        token = int(tokens[0])
        assert self.allowed[token]
        self.tokens.append(token)
        self.complete = np.array([token in self._eos_ids or len(self.tokens) == self._most])

    def fill(self):
        if len(self.tokens) == self._dead:
            raise ConstraintError("constraint: expected a token that goes on")
        bits = np.packbits(np.pad(self.allowed, (0, -VOCAB % 32)), bitorder="little")
        self.mask = bits.view("<i4").astype(np.int32)[None]


def guided_alone(params, prompt, new, walk, *, seed=0, settings=None, eos_ids=()):
    """The tokens of `guided_steps`, and the error that ended them."""
    prepared = prepare(
        CONFIG,
        np.asarray([prompt], np.int32),
        new,
        lj.StaticCache.init(CONFIG, batch_size=1, capacity=CONFIG.n_positions),
        None,
        make_sampler(**(settings or {"temperature": 0.0})),
        jax.random.key(seed)[None],
        eos_ids or None,
        room=CONFIG.n_positions + 1,
    )
    tokens = []
    try:
        for step in guided_steps(params, CONFIG, prepared, walk):
            tokens.append(int(step.token[0]))
    except ConstraintError as error:
        return tokens, error
    return tokens, None


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def core(params):
    """Pages for two of the longest requests, and a bit: they run out.

    In `make test` of the size that test_core.py has, whose compiled programs serve here.
    """
    return make_core(params, CONFIG, slots=whole(3, quick=2), num_pages=18)


def submit(core, prompt, new, **more):
    answer = Answer(more.pop("stop_after", None))
    return answer, core.add(request(prompt, new, answer, **more))


jobs = st.lists(
    st.fixed_dictionaries(
        {
            "shared": st.integers(0, 16),
            "own": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
            "new": st.integers(1, 14),
            "settings": st.sampled_from(SETTINGS[:3]),
            "ends": st.sampled_from([(), (3, 7)]),
            "priority": st.integers(0, 1),
            "after": st.integers(0, 6),
            "stop_after": st.sampled_from([None, None, None, 2]),
            "salt": st.sampled_from([None, 0, 1, 2]),
            "most": st.integers(1, 20),
            "dead": st.sampled_from([None, None, None, 3]),
        }
    ),
    min_size=2,
    max_size=6,
)


@examples(5)
@given(jobs=jobs)
def test_tokens_are_those_of_each_request_alone(params, core, jobs):
    """With guides or without, greedy and drawn, with cached beginnings, preempted or not, whatever the order."""
    answers, failures = [], core.statistics.failures
    for number, job in enumerate(jobs):
        prompt = BEGINNING[: job["shared"]] + job["own"]
        same = {"seed": number, "settings": job["settings"], "eos_ids": job["ends"]}
        guide = None if job["salt"] is None else Walk(job["salt"], job["most"], job["ends"], job["dead"])
        answer, _ = submit(
            core, prompt, job["new"], stop_after=job["stop_after"], priority=job["priority"], guide=guide, **same
        )
        answers.append((answer, prompt, same))
        for _ in range(job["after"]):
            core.step()
            core.pages.check(core.held())
    run(core)
    assert core.statistics.failures == failures
    for job, (answer, prompt, same) in zip(jobs, answers, strict=True):
        expected, error = alone(params, CONFIG, prompt, job["new"], **same), None
        if job["salt"] is not None:
            walk = Walk(job["salt"], job["most"], job["ends"], job["dead"])
            expected, error = guided_alone(params, prompt, job["new"], walk, **same)
        assert answer.tokens == expected[: job["stop_after"]]
        stopped = len(answer.tokens) == job["stop_after"]
        assert (answer.error is None) == (error is None or stopped)
        if answer.error is None and not stopped and job["salt"] is not None:
            assert answer.last.ended == walk.complete[0]


def test_a_guide_wins_over_settings_that_exclude_all_that_it_allows(params, core):
    prompt, banned = [5, 6, 7], SETTINGS[3]
    guided, _ = submit(core, prompt, 6, settings=banned, guide=Walk(1, 9))
    free, _ = submit(core, prompt, 6, settings=banned)
    run(core)
    assert guided.tokens == guided_alone(params, prompt, 6, Walk(1, 9), settings=banned)[0]
    assert isinstance(free.error, lj.SamplerError)


def test_pages_that_run_out_preempt_and_the_guides_stay_with_their_texts(params, core):
    before = core.statistics.preemptions
    answers = [submit(core, [1 + n] * 20, 24, guide=Walk(n, 30))[0] for n in range(3)]
    run(core)
    assert core.statistics.preemptions > before
    for number, answer in enumerate(answers):
        assert answer.tokens == guided_alone(params, [1 + number] * 20, 24, Walk(number, 30))[0]


def test_every_request_gets_a_token_in_every_step(core):
    sequences = [submit(core, [9, number], 20, guide=guide)[1] for number, guide in enumerate([Walk(0, 30), None])]
    while not all(sequence.dispatched for sequence in sequences):
        core.step()
    before = [sequence.dispatched for sequence in sequences]
    for _ in range(5):
        core.step()
    assert [sequence.dispatched for sequence in sequences] == [count + 5 for count in before]
    run(core)


def test_alternatives_and_log_probabilities_are_those_of_the_model(core):
    free, _ = submit(core, [5, 6, 7], 1, top_logprobs=2)
    guided, _ = submit(core, [5, 6, 7], 1, top_logprobs=2, guide=Walk(2, 9))
    run(core)
    assert guided.last.top == free.last.top
    assert guided.last.logprob <= free.last.logprob


def test_a_cancelled_request_with_a_guide_frees_its_pages_at_once(core):
    answer, sequence = submit(core, [9] * 9, 30, guide=Walk(1, 40))
    for _ in range(4):
        core.step()
    core.withdraw(sequence)
    assert core.pages.counts().held == 0
    run(core)
    assert isinstance(answer.error, EngineError)


def test_after_warming_up_nothing_is_compiled(params):
    jax.clear_caches()  # programs of other tests
    core = make_core(params, CONFIG, slots=2, num_pages=18)

    def compiles(warm_up, guides):
        warm_up()
        count = device.compile_count()
        for number, guide in enumerate(guides):
            submit(core, [5, 6, 7 + number], 4, guide=guide)
        run(core)
        return device.compile_count() > count

    fed = programs.feed._cache_size()
    assert not compiles(core.warm_up, [None] * 3)
    assert programs.feed._cache_size() == fed
    assert not compiles(lambda: core.warm_up(guided=True), [Walk(0, 9), None, Walk(1, 9)])
    assert programs.feed._cache_size() > fed


class Poison:
    """What a program returns that fails after it has been dispatched."""

    def __array__(self, *args, **more):
        raise RuntimeError("no memory")


def test_a_step_that_fails_in_the_middle_fails_only_its_requests(params, core, monkeypatch):
    """While choosing, and while the results of the step before are read."""
    for part in ("draw", "results"):
        doomed, _ = submit(core, [3] * 9, 20, guide=Walk(0, 30))
        while not doomed.tokens:
            core.step()
        before, failures = list(doomed.tokens), core.statistics.failures
        waiting, _ = submit(core, [5, 6, 7], 12, guide=Walk(1, 30))

        def fails(*args, **more):
            monkeypatch.undo()
            raise RuntimeError("no memory")

        if part == "draw":
            monkeypatch.setattr(programs, "draw", fails)
        else:
            core._in_flight[0] = (core._in_flight[0][0], (Poison(), Poison(), None))
        run(core)
        assert isinstance(doomed.error, EngineError)
        assert "no memory" in str(doomed.error)
        assert doomed.tokens[: len(before)] == before
        assert waiting.tokens == guided_alone(params, [5, 6, 7], 12, Walk(1, 30))[0]
        assert core.statistics.failures == failures + 1


def test_a_request_that_survives_a_failure_goes_on_where_its_guide_is(params, core, monkeypatch):
    running, _ = submit(core, [5, 6], 12, guide=Walk(1, 30))
    for _ in range(4):
        core.step()
    assert running.tokens
    doomed, _ = submit(core, [3] * 9, 4)

    def fails(*args, **more):
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr(programs, "prefill", fails)
    run(core)
    assert isinstance(doomed.error, EngineError)
    assert running.tokens == guided_alone(params, [5, 6], 12, Walk(1, 30))[0]
