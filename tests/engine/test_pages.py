"""Pages: held, idle or free, and found again by the tokens in them."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from profiles import examples

from llorch_jax.engine.pages import Chain, PagePool, digests
from llorch_jax.errors import CapacityError

SIZE = 2


def fill(pool, pages, tokens, salt=b""):
    """Indexes pages of a text."""
    for page, entry in zip(pages, digests(np.asarray(tokens, np.int32), SIZE, salt), strict=False):
        pool.index(page, *entry)


def test_the_beginning_of_a_text_is_found_page_by_page():
    pool = PagePool(8, SIZE)
    pages = pool.allocate(3)
    fill(pool, pages, [1, 2, 3, 4, 5, 6])
    assert pool.match(np.array([1, 2, 3, 4, 9, 9])) == pages[:2]
    assert pool.match(np.array([1, 2, 9, 4, 5, 6])) == pages[:1]
    assert pool.match(np.array([3, 4, 5, 6])) == []


def test_the_last_token_is_always_left_to_compute():
    pool = PagePool(8, SIZE)
    pages = pool.allocate(2)
    fill(pool, pages, [1, 2, 3, 4])
    assert pool.match(np.array([1, 2, 3, 4])) == pages[:1]
    assert pool.match(np.array([1, 2, 3, 4, 5])) == pages


def test_another_salt_finds_nothing():
    pool = PagePool(8, SIZE)
    fill(pool, pool.allocate(2), [1, 2, 3, 4], b"mine")
    assert pool.match(np.arange(1, 6)) == []
    assert len(pool.match(np.arange(1, 6), b"mine")) == 2


def test_a_collision_of_digests_does_not_give_another_text():
    pool = PagePool(8, SIZE)
    (page,) = pool.allocate(1)
    digest, _ = next(iter(digests(np.array([1, 2], np.int32), SIZE)))
    pool.index(page, digest, np.array([7, 7], np.int32).tobytes())
    assert pool.match(np.array([1, 2, 3])) == []


def test_released_pages_are_found_until_they_are_needed_the_longest_unused_and_the_ends_of_texts_first():
    pool = PagePool(4, SIZE)
    old = pool.allocate(2)
    fill(pool, old, [1, 2, 3, 4])
    new = pool.allocate(2)
    fill(pool, new, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    assert pool.counts().idle == 4
    assert pool.allocate(1) == [old[1]]
    assert pool.match(np.arange(1, 6)) == [old[0]]
    assert pool.match(np.arange(5, 10)) == new
    assert pool.counts().evicted == 1


def test_pages_that_another_pool_has_are_marked_wherever_they_are():
    pool = PagePool(8, SIZE)
    pages = pool.allocate(4)
    fill(pool, pages, [1, 2, 3, 4, 5, 6, 7, 8])
    pool.release(pages)
    text = np.arange(1, 10)
    entries = list(digests(text, SIZE))
    assert pool.match(text, elsewhere=lambda digest, content: False) == pages
    taken = pool.allocate(5)  # four free ones, and the end of the text
    assert pool.take_evicted() == [(pages[3], *entries[3])]
    assert pool.take_evicted() == []
    assert pages[3] in taken
    asked = []

    def elsewhere(digest, content):
        asked.append((digest, content))
        return len(asked) == 1

    assert pool.match(np.arange(1, 12), elsewhere=elsewhere) == [*pages[:3], -1]
    assert asked == list(digests(np.arange(1, 11), SIZE))[3:]
    assert pool.match(np.arange(1, 12)) == pages[:3]


def test_a_page_that_is_found_and_held_is_not_reused():
    pool = PagePool(2, SIZE)
    pages = pool.allocate(2)
    fill(pool, pages, [1, 2, 3, 4])
    pool.release(pages)
    pool.hold(pool.match(np.array([1, 2, 3])))
    assert pool.available == 1
    assert pool.allocate(1) == [pages[1]]
    with pytest.raises(CapacityError, match="expected 1 free pages, got 0"):
        pool.allocate(1)


def test_a_chain_gives_the_digests_of_a_whole_text():
    chain = Chain(SIZE, b"s")
    assert [chain.push([1, 2]), chain.push([3, 4])] == list(digests(np.arange(1, 5), SIZE, b"s"))


class Pool(RuleBasedStateMachine):
    """Texts over two letters that come and go, against the texts themselves."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(6, SIZE)
        self.texts = {}  # number: tokens and pages
        self.content = {}  # page: the text up to its end
        self.number = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def begin(self, tokens):
        found = self.pool.match(np.array(tokens))
        for number, page in enumerate(found):
            assert self.content[page] == tokens[: (number + 1) * SIZE]
        missing = -(-len(tokens) // SIZE) - len(found)
        if self.pool.available - self.pool.idle_among(found) < missing:
            return
        self.pool.hold(found)
        pages = found + self.pool.allocate(missing)
        for number, entry in enumerate(digests(np.array(tokens), SIZE)):
            if pages[number] not in found:
                self.content[pages[number]] = tokens[: (number + 1) * SIZE]
            self.pool.index(pages[number], *entry)
        self.number += 1
        self.texts[self.number] = pages

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def end(self, data):
        self.pool.release(self.texts.pop(data.draw(st.sampled_from(sorted(self.texts)))))

    @rule()
    def forget(self):
        if not self.texts:
            self.pool.forget()

    @invariant()
    def books_agree(self):
        self.pool.check(self.texts.values())


TestPool = Pool.TestCase
TestPool.settings = examples(25)
