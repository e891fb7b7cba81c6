"""How hard the tests look: `make test` takes minutes and is always the same, `make thorough` explores.

LLORCH_TESTS=thorough chooses the second, for single files too. It differs in four ways: programs are compiled as users'
are; property tests draw new examples, ten times as many; soaks run at full length; and the dearest cases, such as those
of another layout on the demo model, all run.
"""

import os
from collections.abc import Sequence
from typing import Any

from hypothesis import settings

THOROUGH = os.environ.get("LLORCH_TESTS", "") == "thorough"
_FACTOR = 10 if THOROUGH else 1

# Compiling is what the suite's time goes into, and most programs run once or twice: LLVM's lowest level, and fusions
# without the newer emitters, compile in half the time.
QUICK_XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

settings.register_profile("quick", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("thorough", deadline=None, print_blob=True)


def examples(count: int) -> settings:
    """The number of examples of a property test in `make test`."""
    return settings(max_examples=_FACTOR * count)


def some(cases: Sequence[Any], quick: int) -> list[Any]:
    """Of the cases of a test, all in `make thorough`, `quick` evenly spaced ones in `make test`.

    For cases that repeat, on another model or layout, what cheaper tests hold for every case.
    """
    return list(cases) if THOROUGH else [cases[i * len(cases) // quick] for i in range(quick)]


def pairs(first: Sequence[Any], second: Sequence[Any], turn: int = 0) -> list[tuple[Any, Any]]:
    """All pairs in `make thorough`, a quarter of them in `make test`: each of both occurs, in every turn in others.

    For features that multiply, where each pair is compiled anew.
    """
    found = [(one, other, i + j + turn) for i, one in enumerate(first) for j, other in enumerate(second)]
    return [(one, other) for one, other, number in found if THOROUGH or number % 4 == 0]


def whole(count: int, *, quick: int) -> int:
    """A soak's length: all of it in `make thorough`, `quick` in `make test`."""
    return count if THOROUGH else quick
