"""Bytes and time per decode step of every cache layout, by length of the text.

    python -m benchmarks.caches [--preset gpt2] [--batch 1] [--lengths 64,256,512,1000] [--json FILE] [--plot FILE.png]

Every layout continues the same prompt in a cache that could hold the whole context. The layouts take turns, step by
step, so that a change in the machine's speed affects all of them; the ratio to the static cache is computed per round.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import llorch_jax as lj
from benchmarks.decoder import make_cache
from benchmarks.measure import Sample, machine, random_model, write_json

LAYOUTS = ("static", "dynamic", "rotating:256+4", "paged", "int8", "int4", "paged/int8", "h2o:256")


def measure(preset: str, batch: int, lengths: list[int], rounds: int, layouts: tuple[str, ...]) -> dict[str, Any]:
    """For each length and layout: bytes, milliseconds per step, and the ratio to the first layout."""
    config, params = random_model(preset)
    rows = []
    for length in lengths:
        times = step_times(config, params, batch, length, rounds, layouts)
        for layout, (values, size) in times.items():
            ratios = [mine / other for mine, other in zip(values, times[layouts[0]][0], strict=True)]
            rows.append(
                {
                    "length": length,
                    "layout": layout,
                    "bytes": size,
                    "step_ms": Sample.of(values),
                    "ratio": statistics.median(ratios),
                }
            )
    return {"setting": {"preset": preset, "batch": batch}, "machine": machine(), "rows": rows}


def step_times(
    config: lj.GPT2Config, params: lj.Params, batch: int, length: int, rounds: int, layouts: tuple[str, ...]
) -> dict[str, tuple[list[float], int]]:
    """Milliseconds per step in each round, and the bytes of the cache, by layout."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), np.int32)
    token = np.zeros(batch, np.int32)
    caches = {}
    for layout in layouts:
        _, cache = lj.prefill(params, config, tokens, make_cache(config, layout, batch))
        caches[layout] = jax.block_until_ready(lj.decode_step(params, config, token, cache)[1])  # compiles
    times: dict[str, list[float]] = {layout: [] for layout in layouts}
    for _ in range(rounds):
        for layout in layouts:
            start = time.perf_counter()
            _, caches[layout] = jax.block_until_ready(lj.decode_step(params, config, token, caches[layout]))
            times[layout].append(1000 * (time.perf_counter() - start))
    return {layout: (times[layout], caches[layout].memory_usage()) for layout in layouts}


def plot(report: dict[str, Any], path: Path) -> None:
    """Plots time per step and bytes over the length, with one line per layout."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (time_axes, byte_axes) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for layout in dict.fromkeys(row["layout"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["layout"] == layout]
        lengths = [row["length"] for row in rows]
        time_axes.plot(lengths, [row["step_ms"].median for row in rows], marker="o", label=layout)
        byte_axes.plot(lengths, [row["bytes"] / 1e6 for row in rows], marker="o", label=layout)
    time_axes.set(xlabel="tokens in the cache", ylabel="ms per decode step", ylim=(0, None))
    byte_axes.set(xlabel="tokens in the cache", ylabel="MB", ylim=(0, None))
    byte_axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", default="64,256,512,1000", help="comma-separated numbers of tokens")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated cache specifications")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    lengths = [int(n) for n in arguments.lengths.split(",")]
    layouts = tuple(arguments.layouts.split(","))
    report = measure(arguments.preset, arguments.batch, lengths, arguments.rounds, layouts)
    print(f"{'tokens':>6}  {'layout':<16}{'MB':>8}  {'ms/step (least .. most)':<28}{'/ ' + layouts[0]:>9}")
    for row in report["rows"]:
        name = row["layout"]
        size = row["bytes"] / 1e6
        print(f"{row['length']:>6}  {name:<16}{size:>8.1f}  {row['step_ms']!s:<28}{row['ratio']:>9.2f}")
    write_json(arguments.json, report)
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
