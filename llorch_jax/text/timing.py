"""Where the time of a call goes: compiling, prefill, decoding."""

import dataclasses
import time
from functools import cache

import jax


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of one generation.

    Attributes:
        compile: tracing and compiling; 0 if all programs were compiled before.
        prefill: from the start to the first token, without compiling.
        decode: from the first token to the last, without compiling.
        new_tokens: number of new tokens of the longest row.
    """

    compile: float
    prefill: float
    decode: float
    new_tokens: int

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per decode step; 0 if only the prefill's token was generated."""
        return 1000 * self.decode / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0


class Stopwatch:
    """Splits the time since its start, or since the last `lap`, into compiling and the rest."""

    def __init__(self) -> None:
        self._compiled = compile_seconds()
        self._time = time.perf_counter()
        self.compile = 0.0

    def lap(self) -> float:
        """Seconds since the last lap without compiling, which is added to `compile`."""
        compiling = compile_seconds() - self._compiled
        elapsed = time.perf_counter() - self._time
        self.skip()
        self.compile += compiling
        return max(0.0, elapsed - compiling)

    def skip(self) -> None:
        """Leaves out the time since the last lap, compiling included."""
        self._compiled = compile_seconds()
        self._time = time.perf_counter()


_PHASES = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


def compile_seconds() -> float:
    """Seconds that JAX has spent on tracing and compiling in this process since the first call of this function."""
    return _compile_log()[0]


@cache
def _compile_log() -> list[float]:
    """A sum, kept by a listener that lives as long as the process: JAX offers no way to take one back."""
    total = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith(_PHASES):
            total[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return total
