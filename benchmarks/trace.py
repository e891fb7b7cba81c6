"""Wall-clock time of a compiled program by operation, from JAX's profiler.

XLA's CPU runtime reports when each operation of a program begins and ends. Every moment of the run is attributed to the
operations that are running, so that their times are never negative and sum to the whole.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.hlo import Operation, module_name, operations


class Span(NamedTuple):
    """One run of an operation, in nanoseconds."""

    name: str
    start: float
    end: float


class Program:
    """A compiled program whose runs can be divided among the named scopes that it was traced with."""

    def __init__(self, function: Any, *args: Any, scopes: tuple[str, ...]) -> None:
        """Compiles a jitted function for these arguments.

        A program in the persistent compilation cache may have the scopes of another version of the code, since JAX
        ignores them when it looks a program up; here they are part of the key.
        """
        before = jax.config.jax_compilation_cache_include_metadata_in_key
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
        try:
            self.compiled = function.lower(*args).compile()
        finally:
            jax.config.update("jax_compilation_cache_include_metadata_in_key", before)
        text = self.compiled.as_text()
        self._module = module_name(text)
        self.operations = operations(text, scopes)

    def allocated(self) -> int:
        """Bytes that a call needs in addition to its arguments: scratch memory, and results not in donated buffers."""
        sizes = self.compiled.memory_analysis()
        return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes

    def parts(self, run: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds by scope for one run of the program, which `run` must call once.

        "" stands for operations outside all scopes, and for time in which no operation is running. The parts sum to
        the time from the beginning of the first operation to the end of the last.
        """
        spans = [span for span in record(run, self._module) if span.name in self.operations]
        if not spans:
            raise RuntimeError(f"profile: expected operations of {self._module}, got none")
        found: dict[str, float] = {}
        for name, time in exclusive(spans, self.operations).items():
            shares = {"": 1.0} if name is None else self.operations[name].shares
            for scope, share in shares.items():
                found[scope] = found.get(scope, 0.0) + share * time / 1e6
        return found


def record(run: Callable[[], Any], module: str) -> list[Span]:
    """When each operation of a module ran during a call."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1  # only operations: other events would take more time to record
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    starts: list[Span] = []
    ends: dict[str, list[float]] = {}
    for event in (event for plane in profile.planes for line in plane.lines for event in line.events):
        if event.name.startswith("end: "):  # the end of an operation that continued after its thread was released
            ends.setdefault(event.name.removeprefix("end: "), []).append(event.end_ns)
        elif dict(event.stats).get("hlo_module") == module:
            starts.append(Span(event.name, event.start_ns, event.end_ns))
    return with_ends(starts, ends)


def with_ends(starts: list[Span], ends: dict[str, list[float]]) -> list[Span]:
    """The spans, each until its end event if there is one: the first after its start."""
    found = []
    waiting = {name: sorted(times, reverse=True) for name, times in ends.items()}
    for span in sorted(starts, key=lambda span: span.start):
        times = waiting.get(span.name, [])
        while times and times[-1] < span.start:
            times.pop()
        found.append(span._replace(end=max(span.end, times.pop() if times else span.end)))
    return found


def exclusive(spans: list[Span], operations: Mapping[str, Operation]) -> dict[str | None, float]:
    """Nanoseconds of each operation, which sum to the time from the first start to the last end.

    Operations that run at the same time share it equally. A container gets the time in which none of the others runs,
    and None the time in which nothing runs at all.
    """
    moments = sorted([(span.start, 1, span) for span in spans] + [(span.end, 0, span) for span in spans])
    times: dict[str | None, float] = {}
    running: dict[Span, int] = {}
    before = moments[0][0]
    for moment, starts, span in moments:
        if moment > before:
            for name, share in _running_shares(running, operations).items():
                times[name] = times.get(name, 0.0) + share * (moment - before)
            before = moment
        running[span] = running.get(span, 0) + (1 if starts else -1)
        if not running[span]:
            del running[span]
    return times


def _running_shares(running: Mapping[Span, int], operations: Mapping[str, Operation]) -> dict[str | None, float]:
    """The operations that get the time in which these spans run."""
    if not running:
        return {None: 1.0}
    leaves = [span.name for span in running if not operations[span.name].container]
    if not leaves:
        return {max(running, key=lambda span: span.start).name: 1.0}
    return {name: leaves.count(name) / len(leaves) for name in leaves}
