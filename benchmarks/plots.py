"""The plots of a report, made with matplotlib from the figures that the run has. Bars and points show their spread."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.reports import Report
from benchmarks.wording import case_words, words

WIDTH = 4.8  # inches: labels stay readable on a page as narrow as a phone
Plot = Callable[[list[Report]], Figure]


def draw(groups: dict[str, list[Report]], folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """Draws the plots for which there are figures. Returns captions and files by benchmark."""
    drawn: dict[str, list[tuple[str, Path]]] = {}
    for benchmark, group in groups.items():
        for number, (caption, plot) in enumerate(PLOTS.get(benchmark, [])):
            figure = plot(group)
            path = folder / f"{benchmark}{number or ''}.png"
            figure.savefig(path, dpi=200)
            pyplot.close(figure)
            drawn.setdefault(benchmark, []).append((caption, path))
    return drawn


def _axes(height: float) -> tuple[Figure, Any]:
    return pyplot.subplots(figsize=(WIDTH, height), layout="constrained")


def _spread(samples: Sequence[Report]) -> list[list[float]]:
    """The distances of minimum and maximum from the medians, in matplotlib's form."""
    down = [sample["median"] - sample["low"] for sample in samples]
    up = [sample["high"] - sample["median"] for sample in samples]
    return [down, up]


def _with_limits(group: list[Report]) -> Figure:
    """Draws one bar per row, with a mark at the reference value."""
    rows = [(words(each["benchmark"]).row(line, each["setting"]), line) for each in group for line in each["rows"]]
    names = [name.replace(", ", ",\n", 1) for name, _ in rows]
    samples = [line["value"] for _, line in rows]
    figure, axes = _axes(1.0 + 0.6 * len(rows))
    axes.barh(names, [each["median"] for each in samples], 0.6, xerr=_spread(samples), capsize=3, label="measured")
    limits = [line["against"] for _, line in rows]
    axes.scatter(limits, names, 350, "tab:orange", marker="|", linewidths=3, label=group[0]["against"], zorder=3)
    axes.invert_yaxis()
    axes.set(xlabel=rows[0][1]["unit"])
    _from_zero(axes, samples)
    _whole_numbers(axes.xaxis)
    _legend(figure)
    return figure


def _from_zero(axes: Any, samples: Sequence[Report]) -> None:
    """Starts the horizontal axis at 0, unless all are negative, as differences of times on a tiny model may be."""
    if max(each["high"] for each in samples) > 0:
        axes.set_xlim(0)


def _legend(figure: Figure, columns: int = 3) -> None:
    """Draws a legend above the axes, where it hides nothing."""
    figure.legend(loc="outside upper center", ncols=columns, fontsize="small", frameon=False, markerscale=0.5)


def _whole_numbers(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(6, integer=True))  # for smaller ranges it uses fractions


def _series(name: str, label: str) -> Plot:
    """Milliseconds per step over rows or layers, with the floor."""

    def plot(group: list[Report]) -> Figure:
        rows = [line for each in group for line in each["rows"] if line["series"] == name]
        sizes = [line["size"] for line in rows]
        samples = [line["value"] for line in rows]
        figure, axes = _axes(3.4)
        axes.errorbar(
            sizes, [s["median"] for s in samples], _spread(samples), marker="o", capsize=3, label="decode step"
        )
        axes.plot(sizes, [line["against"] for line in rows], "k--", label="floor")
        axes.set(xlabel=label, ylabel="ms per step", ylim=(0, None))
        _whole_numbers(axes.yaxis)
        axes.set_xticks(sizes if len(sizes) < 5 else [size for size in sizes if size == 1 or size >= max(sizes) / 8])
        _legend(figure)
        return figure

    return plot


def _context(group: list[Report]) -> Figure:
    """Milliseconds per step over tokens in the cache, with the floor."""
    rows = [line for each in group for line in each["rows"]]
    figure, axes = _axes(3.4)
    for layout in dict.fromkeys(line["layout"] for line in rows):
        own = [line for line in rows if line["layout"] == layout]
        samples = [line["value"] for line in own]
        places = [line["length"] for line in own]
        axes.errorbar(places, [s["median"] for s in samples], _spread(samples), marker="o", capsize=3, label=layout)
    axes.plot(places, [line["against"] for line in own], "k--", label="floor")
    axes.set(xlabel="tokens in the cache", ylabel="ms per step", ylim=(0, None))
    _whole_numbers(axes.xaxis)
    _whole_numbers(axes.yaxis)
    _legend(figure)
    return figure


def _stacked(names: Sequence[str], parts: dict[str, list[float]], label: str, spread: Any = None) -> Figure:
    """Draws one bar per name, stacked from parts, with the spread of the whole."""
    figure, axes = _axes(1.6 + 0.45 * len(names))
    left = [0.0] * len(names)
    colors = pyplot.get_cmap("tab10").colors
    for number, (part, sizes) in enumerate(parts.items()):
        axes.barh(names, sizes, 0.65, left=left, label=part, color=colors[number % 10])
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if spread is not None:
        axes.errorbar(left, names, xerr=spread, fmt="none", ecolor="black", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel=label, xlim=(0, None))
    _legend(figure, 2 if len(parts) > 3 else 3)
    return figure


def _step_parts(group: list[Report]) -> Figure:
    """Milliseconds of each part of a decode step, one bar per layout and length."""
    rows = [(words("profile_cache").row(line, each["setting"]), line) for each in group for line in each["rows"]]
    names = [name for name, _ in rows]
    parts = {part: [line["parts"][part]["median"] for _, line in rows] for part in rows[0][1]["parts"]}
    return _stacked(names, parts, "ms per decode step")


def _startup(group: list[Report]) -> Figure:
    """Seconds until the first token by part, with the spread of the whole."""
    rows = [line for each in group for line in each["rows"]]
    known = ("import", "load", "compile_first")
    parts = {name: [line["parts"][name] for line in rows] for name in known}
    rest = [line["value"]["median"] - sum(line["parts"][name] for name in known) for line in rows]
    labels = {"import": "import", "load": "loading", "compile_first": "compiling"}
    shown = {labels[name]: sizes for name, sizes in parts.items()}
    shown["rest of the first token"] = [max(0.0, each) for each in rest]
    return _stacked([line["name"] for line in rows], shown, "s", _spread([line["value"] for line in rows]))


def _memory(group: list[Report]) -> Figure:
    """Megabytes of weights and cache of every layout, and the peak above both."""
    rows = [line for each in group for line in each["rows"]]
    parts = {
        "weights": [line["weights"] for line in rows],
        "cache": [line["cache"] for line in rows],
        "peak above both": [max(0.0, line["value"]["median"] - line["against"]) for line in rows],
    }
    return _stacked([line["layout"] for line in rows], parts, "MB")


def _peers(kind: str) -> Plot:
    """Milliseconds of every contender, one panel per case."""

    def plot(group: list[Report]) -> Figure:
        rows = [line for each in group for line in each["rows"] if line["kind"] == kind]
        cases = list(dict.fromkeys(line["case"] for line in rows))
        most = max(sum(line["case"] == case for line in rows) for case in cases)
        size = (WIDTH, len(cases) * (0.9 + 0.3 * most))
        figure, panels = pyplot.subplots(len(cases), figsize=size, layout="constrained", squeeze=False)
        for axes, case in zip(panels[:, 0], cases, strict=True):
            own = sorted((line for line in rows if line["case"] == case), key=lambda line: line["time"]["median"])
            samples = [line["time"] for line in own]
            names = [line["contender"] for line in own]
            colors = ["tab:orange" if name.startswith("llorch_jax") else "tab:blue" for name in names]
            axes.barh(names, [s["median"] for s in samples], 0.65, xerr=_spread(samples), capsize=3, color=colors)
            axes.invert_yaxis()
            axes.set_title(case_words(case), fontsize="medium")
            _from_zero(axes, samples)
        panels[-1, 0].set(xlabel="ms per decode step" if kind == "step" else "ms per prefill")
        return figure

    return plot


PLOTS: dict[str, list[tuple[str, Plot]]] = {
    "decode": [("Milliseconds per decode step, and the floor", _with_limits)],
    "prefill": [("Milliseconds per prefill, and the floor", _with_limits)],
    "batch": [
        ("Milliseconds per decode step by number of rows", _series("batch", "rows")),
        ("Milliseconds per decode step by number of layers", _series("layers", "layers")),
    ],
    "long_context": [("Milliseconds per decode step by tokens in the cache", _context)],
    "stream": [("Milliseconds per streamed token", _with_limits)],
    "startup": [("Seconds until the first token", _startup)],
    "memory": [("Peak memory by cache layout", _memory)],
    "profile_cache": [("Milliseconds of a decode step by part", _step_parts)],
    "compare": [
        ("Milliseconds per decode step of every contender", _peers("step")),
        ("Milliseconds per prefill of every contender", _peers("prefill")),
    ],
}
