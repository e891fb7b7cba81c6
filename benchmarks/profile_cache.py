"""Where a decode step spends its time, and whether the cache deserves a separate module.

    python -m benchmarks.profile_cache [--preset gpt2] [--batch 1] [--lengths 64,960]
                                       [--layouts static,dynamic,rotating:256+4,paged,int8,int4,paged/int8]

Runs the compiled loop of `generate_tokens` under JAX's profiler, which records when each operation begins and ends, and
sums the times by the library's named scopes (benchmarks/trace.py). The parts are never negative and sum to the step.
Writing keys and values ("cache update") and making them readable, that is gathering pages or decoding codes ("cache
read"), are the cache's share of a step. Attending to keys and values is attention, wherever they are stored.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import llorch_jax as lj
from benchmarks.caches import LAYOUTS
from benchmarks.decoder import Decoder, make_cache
from benchmarks.limits import Limits
from benchmarks.measure import Sample, interleaved, random_model, seconds
from benchmarks.reports import Report, keep, numbers, parser, report, row, show
from benchmarks.signals import signals
from benchmarks.trace import Program
from llorch_jax.decoding import steps

STEPS = 16  # per measurement
REST = "rest: activation, residuals, loop"
PARTS = {  # by the library's named scopes
    "dense": "dense layers",
    "attention": "attention",
    "cache_update": "cache update",
    "cache_read": "cache read",
    "norm": "norms",
    "embedding": "embedding",
    "logits": "logits",
    "sampling": "sampling",
}


class Loop:
    """The compiled loop of a decoder, timed as a whole and by parts."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        state = decoder.rewind()
        given = decoder.params, decoder.config, decoder.request.decoding, decoder.out, state, decoder.span
        self._program = Program(steps.loop, *given, scopes=tuple(PARTS))
        self.allocated = self._program.allocated()

    def step_ms(self) -> float:
        """Milliseconds per step of one loop."""
        return 1000 * seconds(self._prepared()) / self._decoder.new

    def parts(self) -> dict[str, float]:
        """Milliseconds per step of one loop under the profiler, by part."""
        found = dict.fromkeys((*PARTS.values(), REST), 0.0)
        for scope, time in self._program.parts(self._prepared()).items():
            found[PARTS.get(scope, REST)] += time / self._decoder.new
        return found

    def _prepared(self) -> Callable[[], Any]:
        """Runs the loop once, after the text."""
        decoder = self._decoder
        state = decoder.rewind()

        def run() -> Any:
            given = decoder.params, decoder.request.decoding, decoder.out, state, decoder.span
            decoder.out, decoder.state = self._program.compiled(*given)
            return decoder.out, decoder.state

        return run


def measure(preset: str, batch: int, lengths: list[int], layouts: list[str], rounds: int) -> Report:
    """One row per length and layout, with the parts of its step, and the signals."""
    config, params = random_model(preset)
    rows = []
    for length in lengths:
        fitting = min(length, config.n_positions - STEPS - 1)
        rows += _rows(config, params, batch, fitting, layouts, rounds)
    limits = interleaved(Limits.of(preset).tasks(), rounds)
    setting = {"preset": preset, "batch": batch, "new": STEPS}
    return report("profile_cache", setting, rows, limits, f"{layouts[0]} cache", signals=signals(rows))


def _rows(
    config: lj.GPT2Config, params: lj.Params, batch: int, length: int, layouts: list[str], rounds: int
) -> list[Report]:
    """One row per layout: the step, its parts, and the memory that a call allocates."""
    loops = {}
    for layout in layouts:
        cache = make_cache(config, layout, batch)
        loops[layout] = Loop(Decoder(params, config, cache, length, STEPS))
    profiles: dict[str, list[dict[str, float]]] = {layout: [] for layout in layouts}

    def profile(layout: str) -> float:
        profiles[layout].append(loops[layout].parts())
        return sum(profiles[layout][-1].values())

    tasks: dict[str, Callable[[], float]] = {}
    for layout in layouts:
        tasks[layout] = loops[layout].step_ms
        tasks[f"profiled {layout}"] = lambda layout=layout: profile(layout)
    values = interleaved(tasks, rounds)
    rows = []
    for layout in layouts:
        parts = typical(profiles[layout][1:])  # the first round warms up
        whole = sum(part.median for part in parts.values())
        share = (parts["cache update"].median + parts["cache read"].median) / whole
        slower = statistics.median(values[f"profiled {layout}"]) / statistics.median(values[layout])
        extra = {"layout": layout, "length": length, "parts": parts, "share": share}
        extra |= {"allocated": loops[layout].allocated, "profiling": slower}
        rows.append(row(f"{layout}, {length} tokens", values[layout], values[layouts[0]], **extra))
    return rows


def typical(profiles: Sequence[dict[str, float]]) -> dict[str, Sample]:
    """The parts in the round with the median step, so that they sum to it; minimum and maximum are of all rounds."""
    ordered = sorted(profiles, key=lambda parts: sum(parts.values()))
    chosen = ordered[(len(ordered) - 1) // 2]
    spreads = {name: Sample.of([parts[name] for parts in profiles]) for name in chosen}
    return {name: dataclasses.replace(spread, median=chosen[name]) for name, spread in spreads.items()}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--lengths", type=numbers, default=[64, 960], help="comma-separated numbers of tokens")
    options.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated cache layouts")
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, chosen.batch, chosen.lengths, chosen.layouts.split(","), chosen.rounds)
    show(figures, describe)
    tell_parts(figures)
    tell_signals(figures)
    keep(figures, chosen.json)


def describe(line: Report) -> str:
    """The addition to a row: the cache's share, allocation, and the profiler's overhead."""
    return (
        f"cache {100 * line['share']:.1f} % of the step, {line['allocated'] / 1e6:.2f} MB allocated per call, "
        f"{line['profiling']:.2f} x as long under the profiler"
    )


def tell_parts(figures: Report) -> None:
    """Prints the parts of every row's step."""
    print("a step by part, in ms and % of the step (under the profiler; the parts of a step sum to it):")
    for line in figures["rows"]:
        whole = sum(part["median"] for part in line["parts"].values())
        print(f"  {line['name']}: {whole:.2f} ms")
        for name, part in line["parts"].items():
            print(f"    {name:<36}{part['median']:>8.2f} ms {100 * part['median'] / whole:>6.1f} %")


def tell_signals(figures: Report) -> None:
    """Prints the four signals for a separate cache module."""
    print("signals for a separate cache module:")
    for name, signal in figures["signals"].items():
        print(f"  {name:<13}{'yes' if signal['on'] else 'no':<5}{signal['value']}")


if __name__ == "__main__":
    main()
