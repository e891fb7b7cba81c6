"""What an engine is doing, and what it has done since it started."""

import dataclasses
from typing import Self

from llorch_jax.engine.core import Core
from llorch_jax.engine.host_pages import OffloadCounts
from llorch_jax.engine.pages import PageCounts


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and what it has done since it started.

    Attributes:
        slots: number of requests that can run at once.
        running: requests that have a slot.
        waiting: requests that wait for one.
        pages: how the pages of the cache are used.
        offload: how the second pool is used, if there is one.
        requests: requests submitted so far.
        finished: requests answered in full.
        cancelled: requests cancelled by their callers.
        expired: requests that missed their deadline.
        preemptions: how often a running request has given up its pages, to be computed again later.
        failures: steps that raised an exception.
        steps: decode steps.
        prompt_tokens: prompt tokens of the requests that have got a slot.
        cached_tokens: how many of them the prefix cache had.
        new_tokens: tokens generated.
        first_token: mean seconds from submission to the first token; 0 before there is one.
        between_tokens: mean seconds between two tokens of a request; 0 before there are any.
    """

    slots: int
    running: int
    waiting: int
    pages: PageCounts
    offload: OffloadCounts
    requests: int
    finished: int
    cancelled: int
    expired: int
    preemptions: int
    failures: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token: float
    between_tokens: float

    @classmethod
    def of(cls, core: Core) -> Self:
        """Those of an engine, in its own thread."""
        found = core.statistics
        first, between = found.first_token, found.between_tokens
        counts = {
            field.name: getattr(found, field.name)
            for field in dataclasses.fields(found)
            if isinstance(getattr(found, field.name), int)
        }
        return cls(
            slots=core.slots,
            running=len(core.active),
            waiting=core.waiting,
            pages=core.pages.counts(),
            offload=core.offload.store.counts(),
            first_token=first.total / max(first.count, 1),
            between_tokens=between.total / max(between.count, 1),
            **counts,
        )

    @property
    def hit_rate(self) -> float:
        """The part of the prompt tokens that the prefix cache had, 0 .. 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
