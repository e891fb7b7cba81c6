"""The suite that `python -m benchmarks` runs: every benchmark, with settings that take about ten minutes in total."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax

from benchmarks import batch, compare, decode, long_context, memory, prefill, profile_cache, startup, stream
from benchmarks.caches import LAYOUTS
from benchmarks.reports import Report

Task = Callable[[], Report]
Peers = dict[str, tuple[str, Path | None]]


def full(peers: Peers, weights: Sequence[str] = ("float32",)) -> dict[str, Task]:
    """The suite for GPT-2 small, and also medium for decoding."""
    return {
        "decode": lambda: decode.measure("gpt2", 1, 64, 64, None, "static", 7),
        "decode-960": lambda: decode.measure("gpt2", 1, 960, 32, 1024, "static", 7),
        "decode-medium": lambda: decode.measure("gpt2-medium", 1, 64, 32, None, "static", 5),
        "prefill": lambda: prefill.measure("gpt2", 1, [64, 512], 7),
        "batch": lambda: batch.measure("gpt2", [1, 2, 4, 8, 16, 32], [12, 24, 48], 64, 16, 5),
        "long_context": lambda: long_context.measure(
            "gpt2", 1, [64, 128, 256, 512, 1000], ["static", "dynamic"], 16, 5
        ),
        "stream": lambda: stream.measure("gpt2", 64, 64, 5),
        "startup": lambda: startup.measure("gpt2", 64, 32, 3),
        "memory": lambda: memory.measure("gpt2", 1, 64, 32, None, list(LAYOUTS), 1),
        "profile_cache": lambda: profile_cache.measure(
            "gpt2", 1, [64, 960], ["static", "dynamic", "paged", "int8", "paged/int8"], 5
        ),
        "compare": lambda: compare.measure("gpt2", peers, [(1, 64, 64), (1, 512, 4), (8, 64, 16)], 3, weights),
    }


def quick(peers: Peers, weights: Sequence[str] = ("float32",)) -> dict[str, Task]:
    """The same on a model that computes next to nothing, to see that everything runs; its figures are meaningless.

    Benchmarks use the same sizes, so that few programs are compiled.
    """
    return {
        "decode": lambda: decode.measure("tiny", 1, 16, 16, None, "static", 2),
        "prefill": lambda: prefill.measure("tiny", 1, [16], 2),
        "batch": lambda: batch.measure("tiny", [1], [1], 16, 16, 2),
        "long_context": lambda: long_context.measure("tiny", 1, [15, 16], ["static"], 16, 2),
        "stream": lambda: stream.measure("tiny", 16, 8, 1),
        "startup": lambda: startup.measure("tiny", 16, 8, 1),
        "memory": lambda: memory.measure("tiny", 1, 16, 8, None, ["static"], 1),
        "profile_cache": lambda: profile_cache.measure("tiny", 1, [16], ["static"], 1),
        "compare": lambda: compare.measure("tiny", peers, [(1, 16, 8)], 1, weights),
    }


@contextlib.contextmanager
def hasty_compiling() -> Iterator[None]:
    """Compiles with few optimisations, here and in child processes: for runs whose figures do not matter."""
    with mock.patch.dict(os.environ, JAX_DISABLE_MOST_OPTIMIZATIONS="1"):
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
