"""Peak resident memory of a process that generates, compared with the bytes of its weights and cache.

    python -m benchmarks.memory [--preset gpt2] [--batch 1] [--prompt 64] [--new 32] [--capacity 1024]
                                [--layouts static,dynamic,rotating:256+4,paged,int8,int4,paged/int8]

Each layout runs in a fresh process (Linux only); memory is counted in excess of an interpreter with jax. A row shows
the highest of three peaks, and each of them: loading, the first generation, which compiles, and the next one.
"""

import tempfile
from collections.abc import Sequence

import llorch_jax as lj
from benchmarks.caches import LAYOUTS
from benchmarks.child import run_child
from benchmarks.measure import preset_config, random_model
from benchmarks.reports import Report, keep, parser, report, row, show
from llorch_jax.params import nbytes


def measure(
    preset: str, batch: int, prompt: int, new: int, capacity: int | None, layouts: list[str], rounds: int
) -> Report:
    """One row per layout, in MB."""
    config = preset_config(preset)
    capacity = capacity or config.n_positions
    weights = nbytes(lj.param_shapes(config)) / 1e6
    setting = {"batch": batch, "prompt": prompt, "new": new, "capacity": capacity}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        lj.save_model(folder, *random_model(preset))
        for layout in layouts:
            runs = [run_child("memory", folder=folder, layout=layout, **setting) for _ in range(rounds)]
            cache = runs[0]["cache_bytes"] / 1e6
            peaks = [max(run["peaks"].values()) / 1e6 for run in runs]
            parts = {phase: size / 1e6 for phase, size in runs[-1]["peaks"].items()}
            line = row(layout, peaks, [weights + cache] * rounds, "MB", layout=layout, weights=weights, cache=cache)
            rows.append(line | {"parts": parts})
    return report("memory", {"preset": preset, **setting}, rows, {}, against="weights + cache")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=32)
    options.add_argument("--capacity", type=int, help="tokens per row (default: the whole context)")
    options.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated cache layouts")
    chosen = options.parse_args(argv)
    setting = (chosen.preset, chosen.batch, chosen.prompt, chosen.new, chosen.capacity, chosen.layouts.split(","))
    figures = measure(*setting, chosen.rounds)
    show(figures, lambda row: ", ".join(f"{name} {size:.0f}" for name, size in row["parts"].items()))
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
