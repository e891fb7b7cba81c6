"""Plans the engine's next step: a pure function of the waiting requests, the running ones and the free pages.

Continuous batching (Yu et al. 2022, "Orca") with chunked prefill (Agrawal et al. 2024, "Sarathi-Serve", section 4.2):
every running stream gets its next token in every step, and prompts are computed in chunks within a budget of tokens per
step, so that a long prompt does not stall the others.

Requests are ordered by rank: higher priority first, then earlier arrival. When pages run out, the last requests in the
order give up theirs and are computed again later; they keep their rank. The first request always continues, and since
one that could never fit is refused in advance, all requests end.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Rank(NamedTuple):
    """A request's place in the order; lower ranks come first.

    Attributes:
        order: the negative priority.
        arrival: number of the request, from 0.
    """

    order: int
    arrival: int


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A request without a slot.

    Attributes:
        rank: its place in the order.
        tokens: number of tokens to compute before it starts to decode: prompt and earlier results.
        cached: how many of them are in pages of the prefix cache.
        idle: how many of these pages no running request holds; they count as free.
        absent: how many of these pages are in the second pool only; they are copied to free pages.
    """

    rank: Rank
    tokens: int
    cached: int = 0
    idle: int = 0
    absent: int = 0


@dataclasses.dataclass(frozen=True)
class Running:
    """A request with a slot.

    Attributes:
        rank: its place in the order.
        computed: number of its tokens that the cache holds.
        tokens: number of tokens to compute before it decodes; it does so once `computed` has reached them.
        pages: number of pages up to its last one, including those that a window has freed.
        owned: number of pages that become free if it is preempted.
        ended: whether all its tokens have been dispatched; it then holds its slot until they have been read.
    """

    rank: Rank
    computed: int
    tokens: int
    pages: int
    owned: int
    ended: bool = False

    @property
    def decoding(self) -> bool:
        """Whether its next step computes a single new token."""
        return self.computed >= self.tokens


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a step.

    Attributes:
        slots: number of requests that can run at once.
        page_size: tokens per page.
        chunk: maximum number of prompt tokens per step while other requests are decoding.
        idle_chunk: the same while no request is decoding.
    """

    slots: int
    page_size: int
    chunk: int
    idle_chunk: int


class Chunk(NamedTuple):
    """Tokens of one request to compute in a step.

    Attributes:
        rank: rank of the request.
        tokens: number of tokens.
    """

    rank: Rank
    tokens: int


class Plan(NamedTuple):
    """The next step.

    Attributes:
        preempt: running requests that give up their slots and pages, before anything else.
        admit: waiting requests that get a slot.
        prefill: chunks of running and admitted requests.
        decode: running requests that get their next token.
    """

    preempt: tuple[Rank, ...]
    admit: tuple[Rank, ...]
    prefill: tuple[Chunk, ...]
    decode: tuple[Rank, ...]


def schedule(waiting: Sequence[Waiting], running: Sequence[Running], free: int, limits: Limits) -> Plan:
    """Plans the next step.

    Args:
        waiting: at least the first `limits.slots` of the waiting requests by rank.
        running: all running requests.
        free: number of pages that can be allocated, including cached ones that nobody holds.
        limits: the limits of a step.
    """
    step = _Step(running, free, limits)
    by_rank = sorted((each for each in running if not each.ended), key=lambda each: each.rank)
    for each in by_rank:
        if each.decoding:
            step.decode_next(each)
    budget = limits.chunk if step.decode else limits.idle_chunk
    for each in by_rank:
        if not each.decoding and budget > 0:
            budget -= step.prefill_next(each, budget)
    slots = limits.slots - len(running) + len(step.preempted)
    if not step.preempted:  # otherwise there are too few pages already
        for new in sorted(waiting, key=lambda each: each.rank):
            count = step.admit_next(new, budget) if slots > 0 and budget > 0 else 0
            if count == 0:
                break  # those after it wait too, or it might never get its pages
            budget -= count
            slots -= 1
    return step.plan()


class _Step:
    """A plan in the making."""

    def __init__(self, running: Sequence[Running], free: int, limits: Limits) -> None:
        self._limits = limits
        self._free = free
        self._victims = sorted((each for each in running if not each.ended), key=lambda each: each.rank)
        self.preempted: list[Rank] = []
        self._admitted: list[Rank] = []
        self._chunks: dict[Rank, int] = {}
        self.decode: list[Rank] = []

    def plan(self) -> Plan:
        """The plan so far."""
        chunks = tuple(Chunk(rank, count) for rank, count in self._chunks.items())
        return Plan(tuple(self.preempted), tuple(self._admitted), chunks, tuple(self.decode))

    def decode_next(self, each: Running) -> None:
        """Plans the next token of a request, if it can get a page for it."""
        if each.rank not in self.preempted and self._find(self._pages(each.computed + 1) - each.pages, each.rank):
            self.decode.append(each.rank)

    def prefill_next(self, each: Running, budget: int) -> int:
        """Plans a chunk of a running request, and returns its size."""
        if each.rank in self.preempted:
            return 0
        count = min(each.tokens - each.computed, budget)
        if not self._find(self._pages(each.computed + count) - each.pages, each.rank):
            return 0
        self._chunks[each.rank] = count
        return count

    def admit_next(self, new: Waiting, budget: int) -> int:
        """Plans the first chunk of a waiting request if there are pages for it, and returns its size.

        A page for each running request stays free, so that it is not preempted at once.
        """
        count = min(new.tokens - new.cached, budget)
        taken = new.idle + new.absent
        needed = self._pages(new.cached + count) - new.cached // self._limits.page_size + taken
        if needed + len(self.decode) + len(self._admitted) > self._free and (self._victims or self._admitted):
            return 0
        if needed > self._free:
            return 0
        self._free -= needed
        self._admitted.append(new.rank)
        self._chunks[new.rank] = count
        return count

    def _find(self, needed: int, rank: Rank) -> bool:
        """Takes pages for a request, preempting those after it in the order and, if need be, the request itself."""
        while self._free < needed:
            victim = self._victims.pop()
            self.preempted.append(victim.rank)
            self._free += victim.owned
            if victim.rank in self.decode:
                self.decode.remove(victim.rank)
            self._chunks.pop(victim.rank, None)
            if victim.rank == rank:
                return False
        self._free -= max(needed, 0)
        return True

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._limits.page_size)
