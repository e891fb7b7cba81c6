"""The plot of the engine's figures, made with matplotlib."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, ScalarFormatter

from benchmarks.reports import Report


def plot(figures: Report, path: Path) -> None:
    """Plots the latencies at the three percentiles, and the time to the first token after a prefix."""
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    titles = {"first_token_ms": "time to the first token", "between_tokens_ms": "time between two tokens"}
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        for row, marker in zip(figures["rows"], "o^sDv", strict=False):
            axis.plot(range(3), row[key].values(), marker=marker, linewidth=1, label=row["name"])
        axis.set_xticks(range(3), ["median", "95 %", "99 %"])
        axis.set(title=title, xlabel="percentile", ylabel="ms (logarithmic)", yscale="log", xlim=(-0.3, 2.3))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_locator(LogLocator(subs=()))
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    prefix = figures["prefix_hit_ms"]
    places = {"computed": "computed", "cached": "cached", "restored": "in the\nsecond pool"}
    bars = axes[2].bar(list(places.values()), [prefix[name] for name in places], 0.6, color="tab:gray")
    axes[2].bar_label(bars, fmt="{:,.1f}", padding=2)
    axes[2].margins(y=0.12)
    axes[2].set(title=f"first token after {prefix['tokens']} tokens", xlabel="the prefix is", ylabel="ms")
    setting = figures["setting"]
    figure.suptitle(
        f"{setting['preset']}: {setting['requests']} requests, {setting['rate']:g} per second, {setting['slots']} slots"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
