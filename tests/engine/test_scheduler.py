"""The scheduler by itself, in simulations of an engine that computes nothing."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax.engine.scheduler import Chunk, Limits, Plan, Rank, Running, Waiting, schedule

LIMITS = Limits(slots=3, page_size=4, chunk=5, idle_chunk=12)


def blocks(tokens):
    return -(-tokens // LIMITS.page_size)


@dataclasses.dataclass
class Request:
    """A request in a simulation."""

    rank: Rank
    tokens: int  # of the prompt
    new: int  # tokens to generate
    arrival: int  # number of the step
    computed: int = 0
    got: int = 0
    pages: int = 0
    runs: bool = False
    target: int = 0

    def waiting(self):
        return Waiting(self.rank, self.tokens + self.got)

    def running(self):
        return Running(self.rank, self.computed, self.target, self.pages, self.pages)


class Simulation:
    """Requests, pages and plans, with the rules that every plan must keep."""

    def __init__(self, requests, num_pages):
        self.requests = {each.rank: each for each in requests}
        self.num_pages = num_pages
        self.step_number = 0

    @property
    def free(self):
        return self.num_pages - sum(each.pages for each in self.requests.values())

    def left(self):
        return [each for each in self.requests.values() if each.got < each.new]

    def step(self):
        here = [each for each in self.left() if each.arrival <= self.step_number]
        waiting = sorted((each for each in here if not each.runs), key=lambda each: each.rank)
        running = [each for each in here if each.runs]
        plan = schedule(
            [each.waiting() for each in waiting[:3]], [each.running() for each in running], self.free, LIMITS
        )
        self.check(plan, waiting, running)
        for rank in plan.preempt:
            each = self.requests[rank]
            each.runs, each.pages, each.computed = False, 0, 0
        for rank in plan.admit:
            each = self.requests[rank]
            each.runs, each.target = True, each.tokens + each.got
        for rank in plan.decode:
            self.compute(self.requests[rank], 1)
            self.requests[rank].got += 1
        for rank, count in plan.prefill:
            each = self.requests[rank]
            self.compute(each, count)
            each.got += each.computed == each.target
        for each in running:
            if each.got >= each.new:
                each.runs, each.pages = False, 0
        assert self.free >= 0
        self.step_number += 1
        return plan

    def compute(self, each, count):
        each.computed += count
        each.pages = max(each.pages, blocks(each.computed))

    def check(self, plan, waiting, running):
        assert set(plan.admit) <= {each.rank for each in waiting}
        assert len(running) - len(plan.preempt) + len(plan.admit) <= LIMITS.slots
        assert not set(plan.preempt) & ({*plan.decode} | {rank for rank, _ in plan.prefill})
        budget = LIMITS.chunk if plan.decode else LIMITS.idle_chunk
        assert sum(count for _, count in plan.prefill) <= budget
        assert list(plan.admit) == [each.rank for each in waiting[: len(plan.admit)]]
        going = {*plan.decode} | {rank for rank, _ in plan.prefill}
        decoding = sorted(each.rank for each in running if each.computed >= each.target)
        if running:
            first = min(each.rank for each in running)
            budgeted = any(each.rank == first and each.computed < each.target for each in running) and plan.decode
            assert first in going or budgeted, "the first in rank goes on"
        for rank in decoding:
            assert rank in plan.decode or rank in plan.preempt, "a stream is never merely skipped"
        if plan.preempt:
            stay = [each.rank for each in running if each.rank not in plan.preempt]
            assert not stay or max(stay) < min(plan.preempt), "the last in rank go first"


requests = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=9
)


@examples(150)
@given(requests, st.integers(11, 30))
def test_all_requests_end_whatever_comes(given_requests, num_pages):
    all_requests = [Request(Rank(-p, n), tokens, new, when) for n, (p, tokens, new, when) in enumerate(given_requests)]
    simulation = Simulation(all_requests, num_pages)
    for _ in range(2000):
        if not simulation.left():
            return
        simulation.step()
    raise AssertionError("some requests never end")


def run(computed, tokens, pages=None, number=0, priority=0, **more):
    pages = blocks(computed) if pages is None else pages
    return Running(Rank(-priority, number), computed, tokens, pages, pages, **more)


def test_every_stream_gets_its_token_and_a_prompt_no_more_than_a_chunk():
    plan = schedule([Waiting(Rank(0, 5), 100)], [run(8, 8), run(9, 9, number=1)], 50, LIMITS)
    assert plan == Plan((), (Rank(0, 5),), (Chunk(Rank(0, 5), 5),), (Rank(0, 0), Rank(0, 1)))


def test_with_no_stream_a_chunk_is_larger():
    plan = schedule([Waiting(Rank(0, 5), 100)], [], 50, LIMITS)
    assert plan.prefill == (Chunk(Rank(0, 5), 12),)


def test_several_short_prompts_share_a_chunk():
    waiting = [Waiting(Rank(0, number), 4) for number in range(4)]
    plan = schedule(waiting, [], 50, LIMITS)
    assert plan.prefill == tuple(Chunk(Rank(0, number), 4) for number in range(3))


def test_a_cached_beginning_is_not_computed():
    plan = schedule([Waiting(Rank(0, 0), 11, cached=8, idle=2)], [], 3, LIMITS)
    assert plan.prefill == (Chunk(Rank(0, 0), 3),)
    assert schedule([Waiting(Rank(0, 0), 11, cached=8, idle=2)], [], 2, LIMITS).admit == ()


def test_pages_from_the_second_pool_are_allocated_but_not_computed():
    """Of three cached pages, one is held by others, one is idle, and one comes back from the second pool."""
    new = Waiting(Rank(0, 0), 15, cached=12, idle=1, absent=1)
    assert schedule([new], [], 3, LIMITS).prefill == (Chunk(Rank(0, 0), 3),)
    assert schedule([new], [], 2, LIMITS).admit == ()


def test_higher_priority_is_admitted_first_and_equal_priority_in_order_of_arrival():
    waiting = [Waiting(Rank(0, 1), 3), Waiting(Rank(-1, 7), 3), Waiting(Rank(0, 0), 3)]
    assert schedule(waiting, [], 50, LIMITS).admit == (Rank(-1, 7), Rank(0, 0), Rank(0, 1))


def test_where_pages_run_out_the_last_in_rank_gives_its_own_up():
    running = [run(8, 8), run(8, 8, number=1), run(8, 8, number=2)]
    plan = schedule([Waiting(Rank(0, 9), 4)], running, 0, LIMITS)
    assert plan == Plan((Rank(0, 2),), (), (), (Rank(0, 0), Rank(0, 1)))


def test_who_has_got_all_its_tokens_is_neither_computed_nor_preempted():
    running = [run(8, 8), run(8, 8, number=1, ended=True)]
    assert schedule([], running, 1, LIMITS).decode == (Rank(0, 0),)
    assert schedule([], running, 0, LIMITS) == Plan((Rank(0, 0),), (), (), ())


@pytest.mark.parametrize("free", [4, 5])
def test_a_request_is_not_admitted_where_it_would_be_preempted_at_once(free):
    """It needs three pages, and each of the two streams may need one at any time."""
    running = [run(8, 8, pages=3), run(8, 8, number=1, pages=3)]
    limits = dataclasses.replace(LIMITS, chunk=12)
    plan = schedule([Waiting(Rank(0, 9), 12)], running, free, limits)
    assert len(plan.admit) == (free == 5)
