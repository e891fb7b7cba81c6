"""A random trace of requests, and the figures of running it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import llorch_jax as lj


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request in a trace: its arrival in seconds after the start, its prompt, and how many tokens it asks for."""

    at: float
    prompt: list[int]
    new: int


@dataclasses.dataclass
class Times:
    """When the tokens of one request arrived, in seconds after the start of the trace; and which, if they were kept."""

    arrival: Arrival
    tokens: list[float] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds from arrival to the first token."""
        return self.tokens[0] - self.arrival.at


def trace(config: lj.GPT2Config, requests: int, rate: float, seed: int = 0) -> list[Arrival]:
    """A trace of random arrivals."""
    dice = np.random.default_rng(seed)
    at = np.cumsum(dice.exponential(1 / rate, requests))
    most = config.n_positions // 2
    prompts = np.clip(dice.lognormal(np.log(100), 0.8, requests), 8, most).astype(int)
    news = np.clip(dice.lognormal(np.log(48), 0.6, requests), 8, min(200, most)).astype(int)
    texts = [dice.integers(0, config.vocab_size, count).tolist() for count in prompts]
    return [Arrival(float(when), text, int(new)) for when, text, new in zip(at, texts, news, strict=True)]


def summary(times: Sequence[Times]) -> dict[str, Any]:
    """Throughput in tokens per second, and percentiles of latencies in ms."""
    between = [1000 * gap for each in times for gap in np.diff(each.tokens)]
    first = [1000 * each.first for each in times]
    span = max(each.tokens[-1] for each in times) - min(each.arrival.at for each in times)

    def at(values: list[float]) -> dict[str, float]:
        return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}

    total = sum(len(each.tokens) for each in times)
    return {"tokens_per_second": total / span, "first_token_ms": at(first), "between_tokens_ms": at(between)}
