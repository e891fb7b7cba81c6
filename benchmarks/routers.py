"""Routers: which replica gets a request, by the number of requests at each and the beginning of its prompt."""

import bisect
import hashlib
import math
from collections.abc import Callable

import numpy as np

from llorch_jax.engine.pages import digests

Router = Callable[[np.ndarray, np.ndarray], int]  # of a prompt int32 [T], and of the requests at each replica

PREFIX_PAGES = 4  # the beginning that decides: long enough to tell system prompts apart
POINTS = 16  # of each replica on the ring
BOUND = 1.25  # no replica gets more than this times the mean


def at_random(replicas: int, seed: int) -> Router:
    """Any replica."""
    dice = np.random.default_rng(seed)
    return lambda prompt, load: int(dice.integers(replicas))


def round_robin(replicas: int, seed: int) -> Router:
    """One after the other."""
    last = [-1]

    def route(prompt: np.ndarray, load: np.ndarray) -> int:
        last[0] = (last[0] + 1) % replicas
        return last[0]

    return route


def least_loaded(replicas: int, seed: int) -> Router:
    """One with the fewest requests; of several, any."""
    dice = np.random.default_rng(seed)

    def route(prompt: np.ndarray, load: np.ndarray) -> int:
        return int(dice.choice(np.flatnonzero(load == load.min())))

    return route


def prefix_aware(replicas: int, seed: int, page_size: int, bound: float = BOUND) -> Router:
    """The first replica on a ring, from the hash of the prompt's first pages on, that has room below the bound.

    Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018, 1608.01350). A prompt of less than a
    page goes where there are the fewest requests.
    """
    points = sorted(
        (_place(f"{seed} {replica} {n}".encode()), replica) for replica in range(replicas) for n in range(POINTS)
    )
    places = [place for place, _ in points]
    fallback = least_loaded(replicas, seed)

    def route(prompt: np.ndarray, load: np.ndarray) -> int:
        pages = list(digests(prompt[: PREFIX_PAGES * page_size], page_size))
        if not pages:
            return fallback(prompt, load)
        most = math.ceil(bound * (load.sum() + 1) / replicas)
        start = bisect.bisect(places, _place(pages[-1][0]))
        for number in range(len(points)):
            replica = points[(start + number) % len(points)][1]
            if load[replica] < most:
                return replica
        raise AssertionError("some replica has no more requests than the mean")

    return route


def _place(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
