"""The engine's statistics: requests, tokens, and how long they took."""

import bisect
import dataclasses
from typing import Any

# Seconds; upper bounds of the histograms' buckets.
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """A histogram: numbers of observations by size.

    Attributes:
        bounds: upper bounds of the buckets.
        counts: number of observations in each bucket, and above the last bound.
        total: sum of all observations.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one observation."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)


@dataclasses.dataclass
class Statistics:
    """Counts since the engine started.

    Attributes:
        requests: requests queued.
        finished: requests answered in full.
        cancelled: requests cancelled.
        expired: requests that missed their deadline.
        preemptions: times that a running request had to give up its pages.
        failures: steps that raised an exception.
        steps: decode steps.
        prompt_tokens: prompt tokens of admitted requests.
        cached_tokens: how many of them the prefix cache had.
        new_tokens: generated tokens.
        first_token: seconds from a request's arrival to its first token.
        between_tokens: seconds between two tokens of a request.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    preemptions: int = 0
    failures: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first_token: Histogram = dataclasses.field(default_factory=lambda: Histogram(FIRST_TOKEN))
    between_tokens: Histogram = dataclasses.field(default_factory=lambda: Histogram(BETWEEN_TOKENS))

    def token(self, sequence: Any, now: float) -> None:
        """Counts a new token of a request."""
        self.new_tokens += 1
        if sequence.started is None:
            sequence.started = now
            self.first_token.observe(now - sequence.submitted)
        else:
            self.between_tokens.observe(now - sequence.latest)
        sequence.latest = now
