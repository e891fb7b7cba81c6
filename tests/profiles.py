"""How hard the tests look: `make test` takes minutes and is always the same, `make thorough` explores.

LLORCH_TESTS=thorough chooses the second, for single files too. It differs in three ways: programs are compiled as
users' are; property tests draw new examples, ten times as many; soaks run at full length.
"""

import os

from hypothesis import settings

THOROUGH = os.environ.get("LLORCH_TESTS", "") == "thorough"
_FACTOR = 10 if THOROUGH else 1

# Compiling is what the suite's time goes into, and most programs run once or twice: LLVM's lowest level, and fusions
# without the newer emitters, compile in half the time.
QUICK_XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

settings.register_profile("quick", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("thorough", deadline=None, print_blob=True)


def examples(count: int) -> settings:
    """The number of examples of a property test in `make test`."""
    return settings(max_examples=_FACTOR * count)


def whole(count: int, *, quick: int) -> int:
    """A soak's length: all of it in `make thorough`, `quick` in `make test`."""
    return count if THOROUGH else quick
