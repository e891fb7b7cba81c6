"""The second pool by itself: pages found by digest and tokens, within its bytes, the longest unused dropped first."""

import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from profiles import examples

from llorch_jax.engine.host_pages import HostPages
from llorch_jax.errors import EngineError

POOLS = (np.zeros((3, 2, 4), np.float32), (np.zeros((3, 1), np.uint8),))
PAGE_BYTES = 33


def entry(number):
    return f"digest {number}".encode(), f"tokens {number}".encode()


def contents(numbers):
    """Contents that are different for each page."""
    rows = np.array(numbers)
    return rows[:, None, None] + np.zeros((1, 2, 4), np.float32), (rows[:, None].astype(np.uint8),)


def test_it_has_as_many_pages_as_fit_into_its_bytes():
    assert HostPages.of(POOLS, 3 * PAGE_BYTES + 32).counts().total == 3
    with pytest.raises(EngineError, match="offload_bytes: expected 0, or at least a page of 33 bytes, got 32"):
        HostPages.of(POOLS, 32)
    for size in (2**62, 2**80):
        with pytest.raises(EngineError, match="offload_bytes: expected as many bytes as there is memory, got"):
            HostPages.of(POOLS, size)


def test_a_collision_of_digests_does_not_give_another_text():
    store = HostPages.of(POOLS, 3 * PAGE_BYTES)
    store.add([(b"digest", b"tokens")], contents([1]))
    assert store.has(b"digest", b"tokens")
    assert not store.has(b"digest", b"others")
    store.add([(b"digest", b"others")], contents([2]))
    assert store.has(b"digest", b"tokens")
    assert store.counts().pages == 1


def test_of_more_pages_than_there_is_room_for_the_last_stay():
    store = HostPages.of(POOLS, 2 * PAGE_BYTES)
    store.add([entry(number) for number in range(5)], contents(range(5)))
    assert [digest for _, digest, _ in store.entries()] == [entry(3)[0], entry(4)[0]]
    assert store.counts().dropped == 0


class Store(RuleBasedStateMachine):
    """Pages that come, are used and go, against a list of what was used when."""

    TOTAL = 4

    def __init__(self):
        super().__init__()
        self.store = HostPages.of(POOLS, self.TOTAL * PAGE_BYTES + 7)
        self.known = []  # the least recently used first

    @rule(numbers=st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
    def add(self, numbers):
        self.store.add([entry(number) for number in numbers], contents(numbers))
        for number in numbers:
            self.known = [*(each for each in self.known if each != number), number][-self.TOTAL :]

    @rule(number=st.integers(0, 7))
    def want(self, number):
        assert self.store.wants(entry(number)[0]) == (number not in self.known)
        if number in self.known:
            self.known = [*(each for each in self.known if each != number), number]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def restore(self, data):
        numbers = data.draw(st.lists(st.sampled_from(self.known), unique=True, min_size=1))
        rows = self.store.restore([entry(number)[0] for number in numbers])
        found = jax.tree.map(lambda array: array[rows], self.store.arrays)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, contents(numbers)))
        self.known = [*(each for each in self.known if each not in numbers), *reversed(numbers)]

    @invariant()
    def books_agree(self):
        self.store.check()
        assert [digest for _, digest, _ in self.store.entries()] == [entry(number)[0] for number in self.known]
        assert all(self.store.has(*entry(number)) == (number in self.known) for number in range(8))
        counts = self.store.counts()
        assert counts.pages == len(self.known)
        assert counts.bytes == PAGE_BYTES * counts.pages <= self.TOTAL * PAGE_BYTES
        assert counts.saved == counts.pages + counts.dropped


TestStore = Store.TestCase
TestStore.settings = examples(25)
