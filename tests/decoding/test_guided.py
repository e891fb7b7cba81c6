"""Decoding under a guide: the steps of plain decoding from which some tokens are missing."""

import jax
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.decoding.guided import guided_steps
from llorch_jax.decoding.request import prepare
from llorch_jax.decoding.streaming import stream_steps

CONFIG = lj.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
PROMPTS = np.array([[3, 1, 4, 1], [2, 7, 1, 8]], np.int32)


class Without:
    """A guide that never allows some ids, and says that a row is complete after so many tokens."""

    def __init__(self, banned, most):
        self.complete, self.insists = np.zeros(2, bool), np.ones(2, bool)
        self.seen = [[], []]
        self._most = most
        bits = np.ones((2, 64), np.uint64)
        bits[:, banned] = 0
        words = (bits.reshape(2, 2, 32) << np.arange(32, dtype=np.uint64)).sum(-1)
        self._mask = words.astype(np.uint32).view(np.int32)
        self.fill()

    def push(self, tokens, going):
        for row in np.flatnonzero(going):
            self.seen[row].append(int(tokens[row]))

    def fill(self):
        self.mask = self._mask.copy()
        self.complete |= [len(seen) >= self._most for seen in self.seen]


@pytest.fixture(scope="module")
def params():
    params = lj.init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, params)


def run(steps):
    """The steps of a generator, and the cache that it returns."""
    taken = []
    while True:
        try:
            taken.append(next(steps))
        except StopIteration as end:
            return taken, end.value


@pytest.mark.parametrize("overflow", ["error", "reencode"])
def test_equals_a_sampler_that_bans_the_same_tokens(params, overflow):
    free = np.asarray(lj.generate_tokens(params, CONFIG, PROMPTS, 8)[0])
    banned = sorted({int(free[0, 1]), int(free[1, 4]), 33})
    counts = [20, 12] if overflow == "reencode" else [5, 12]
    sampler = lj.Sampling.create(0.7, top_k=6, repetition_penalty=1.2)
    same = lj.Sampling.create(0.7, top_k=6, repetition_penalty=1.2, logit_bias=dict.fromkeys(banned, -np.inf))
    common = {"key": jax.random.key(1), "eos_id": None, "overflow": overflow, "top_logprobs": 2}
    plain, kept = run(stream_steps(params, CONFIG, prepare(CONFIG, PROMPTS, counts, sampler=same, **common)))
    guide = Without(banned, most=99)
    request = prepare(CONFIG, PROMPTS, counts, sampler=sampler, **common)
    guided, cache = run(guided_steps(params, CONFIG, request, guide))
    assert len(plain) == len(guided)
    for row in range(2):
        ends = [n for n, step in enumerate(plain) if step.done[row]]
        upto = (ends[0] if ends else len(plain) - 1) + 1
        assert [int(step.token[row]) for step in guided[:upto]] == [int(step.token[row]) for step in plain[:upto]]
        for ours, theirs in zip(guided[:upto], plain[:upto], strict=True):
            np.testing.assert_allclose(ours.logprob[row], theirs.logprob[row], atol=1e-4)
            np.testing.assert_array_equal(ours.top.ids[row], theirs.top.ids[row])
    assert not set(banned) & {token for seen in guide.seen for token in seen}
    assert [len(seen) for seen in guide.seen] == counts
    assert type(cache) is type(kept)


def test_rows_end_where_the_guide_or_their_number_says(params):
    guide = Without([], most=6)
    steps, cache = run(guided_steps(params, CONFIG, prepare(CONFIG, PROMPTS, [3, 9]), guide))
    assert [step.done.tolist() for step in steps] == [[False] * 2] * 2 + [[True, False]] * 3 + [[True, True]]
    assert [step.finished.tolist() for step in steps[-2:]] == [[False, False], [False, True]]
    assert steps[-1].token[0] == 0
    free = np.asarray(lj.generate_tokens(params, CONFIG, PROMPTS, 6)[0])
    assert [int(step.token[1]) for step in steps] == free[1].tolist()
    assert int(cache.lengths[0]) == 4 + 2


def test_closing_frees_the_cache(params):
    steps = guided_steps(params, CONFIG, prepare(CONFIG, PROMPTS, 9), Without([], most=9))
    next(steps)
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)
