"""The plots of a report, by matplotlib: only figures that the run has are drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks.reports import Report


def draw(reports: list[Report], folder: Path) -> dict[str, Path]:
    """Draws what the reports have figures for. Returns the files by title."""
    drawn = {}
    for benchmark, (title, plot) in PLOTS.items():
        for each in reports:
            if each["benchmark"] == benchmark and each["rows"]:
                figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
                plot(axes, each)
                drawn[title] = folder / f"{benchmark}.png"
                figure.savefig(drawn[title], dpi=120)
                pyplot.close(figure)
    return drawn


def _peers(axes: Any, figures: Report) -> None:
    """Decoded tokens per second of every contender, a group of bars per case."""
    rows = [line for line in figures["rows"] if line["kind"] == "step"]
    cases = list(dict.fromkeys(line["case"] for line in rows))
    names = list(dict.fromkeys(line["contender"] for line in rows))
    for number, name in enumerate(names):
        speed = {line["case"]: line["tokens_per_second"] for line in rows if line["contender"] == name}
        places = [place + 0.8 * number / len(names) for place in range(len(cases))]
        axes.bar(places, [speed.get(case, 0.0) for case in cases], 0.8 / len(names), align="edge", label=name)
    axes.set_xticks([place + 0.4 for place in range(len(cases))], cases)
    axes.set(xlabel="batch x prompt + new tokens", ylabel="decoded tokens/s")
    axes.legend()


def _parts(axes: Any, figures: Report) -> None:
    """Milliseconds of each part of a decode step, one bar per layout and length."""
    rows = figures["rows"][::-1]
    names = [line["name"] for line in rows]
    left = [0.0] * len(rows)
    for part in rows[0]["parts"]:
        sizes = [line["parts"][part]["median"] for line in rows]
        axes.barh(names, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set(xlabel="ms per decode step")
    axes.legend()


def _context(axes: Any, figures: Report) -> None:
    """Milliseconds per token over the length of the text, with the floor."""
    for layout in dict.fromkeys(line["layout"] for line in figures["rows"]):
        rows = [line for line in figures["rows"] if line["layout"] == layout]
        axes.plot(
            [line["length"] for line in rows], [line["value"]["median"] for line in rows], marker="o", label=layout
        )
    axes.plot([line["length"] for line in rows], [line["against"] for line in rows], "k--", label="floor")
    axes.set(xlabel="tokens of context", ylabel="ms per token", ylim=(0, None))
    axes.legend()


def _batch(axes: Any, figures: Report) -> None:
    """Milliseconds per step over the batch, with the floor."""
    rows = [line for line in figures["rows"] if line["series"] == "batch"]
    sizes = [line["size"] for line in rows]
    axes.plot(sizes, [line["value"]["median"] for line in rows], marker="o", label="decode step")
    axes.plot(sizes, [line["against"] for line in rows], "k--", label="floor")
    axes.set(xlabel="rows", ylabel="ms per step", ylim=(0, None))
    axes.legend()


def _memory(axes: Any, figures: Report) -> None:
    """Megabytes of the cache of every layout, and the peak over weights and cache."""
    names = [line["name"] for line in figures["rows"]]
    bottom = [0.0] * len(names)
    peaks = [line["value"]["median"] - line["against"] for line in figures["rows"]]
    parts = {
        "weights": [line["weights"] for line in figures["rows"]],
        "cache": [line["cache"] for line in figures["rows"]],
    }
    for label, sizes in {**parts, "peak above both": [max(0.0, peak) for peak in peaks]}.items():
        axes.bar(names, sizes, bottom=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    axes.set(ylabel="MB")
    axes.legend()


PLOTS: dict[str, tuple[str, Callable[[Any, Report], None]]] = {
    "compare": ("Tokens per second beside other implementations", _peers),
    "profile_cache": ("Time of a decode step by part", _parts),
    "long_context": ("Scaling with context", _context),
    "batch": ("Scaling with batch", _batch),
    "memory": ("Memory by cache layout", _memory),
}
