"""Seconds from starting a process to the first token, with an empty and with a filled compilation cache.

    python -m benchmarks.startup [--preset gpt2] [--prompt 64] [--new 32] [--rounds 3]

The weights are written to disk first, so they are in the operating system's page cache. The ratio is relative to a
process that only imports jax and computes one number. Also shows the seconds spent on compiling, until the first token
and in total.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llorch_jax as lj
from benchmarks.child import run_child
from benchmarks.measure import random_model
from benchmarks.reports import Report, keep, parser, report, row, show


def measure(preset: str, prompt: int, new: int, rounds: int) -> Report:
    """One row for a cold and one for a warm compilation cache."""
    config, params = random_model(preset)
    with tempfile.TemporaryDirectory() as folder:
        lj.save_model(Path(folder) / "model", config, params)
        setting = {"folder": f"{folder}/model", "prompt": prompt, "new": new}
        runs: dict[str, list[dict[str, Any]]] = {"bare": [], "cold": [], "warm": []}
        for number in range(rounds):
            runs["bare"].append(run_child("bare"))
            for name in ("cold", "warm"):  # the second finds what the first has compiled
                runs[name].append(run_child("startup", **setting, compilation_cache=f"{folder}/xla-{number}"))
    bare = [_seconds(run, "started", "first_token") for run in runs["bare"]]
    rows = []
    for name in ("cold", "warm"):
        line = row(f"first token, {name}", [_seconds(run, "started", "first_token") for run in runs[name]], bare, "s")
        rows.append(line | {"parts": _parts(runs[name][-1])})
    return report("startup", {"preset": preset, "prompt": prompt, "new": new}, rows, {}, against="bare process")


def _seconds(run: dict[str, Any], start: str, end: str) -> float:
    return run[end] - run[start]


def _parts(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of one run: importing, loading, the first token, compiling until then, and all compiling."""
    return {
        "import": _seconds(run, "started", "imported"),
        "load": _seconds(run, "imported", "loaded"),
        "first_token": _seconds(run, "loaded", "first_token"),
        "compile_first": run["compile_first"],
        "compile_all": run["compile_all"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=32)
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, chosen.prompt, chosen.new, chosen.rounds)
    show(figures)
    for line in figures["rows"]:
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in line["parts"].items())
        print(f"{line['name']} (last round): {parts}")
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
