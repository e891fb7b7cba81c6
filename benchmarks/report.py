"""A self-contained HTML page, and PNG plots, that show the figures of a run.

    python -m benchmarks.report RUN.json [FILE.json ...] [--out FOLDER]

Takes files of whole runs and of single benchmarks. Plots need matplotlib: pip install '.[plots]'.
"""

import argparse
import base64
import importlib.util
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.check import read_run
from benchmarks.reports import Report
from benchmarks.wording import QUICK, READING, SETTINGS, SIGNALS, TIMES, case_words, number, words

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:1.5rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.3rem;margin:2.2rem 0 .3rem}h3{font-size:1.05rem;margin:1.2rem 0 .2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.4rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem .25rem 0;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
th{font-weight:600;vertical-align:bottom}td{min-width:4rem}td:first-child{min-width:7rem}
td:first-child,th:first-child{position:sticky;left:0;background:#fff}
small{display:block;color:#666;white-space:nowrap}img{width:100%;max-width:40rem;display:block;margin:.6rem 0}
.note{color:#555;margin:.3rem 0;font-size:.85rem}.quick{background:#fff3cd;border:1px solid #e0c060;padding:.6rem .8rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .8rem;margin:.5rem 0}dt{color:#555}dd{margin:0}
code{overflow-wrap:anywhere}
"""
LIMITS = {"bandwidth_gb_s": ("read bandwidth", "GB/s"), "gemm_gflop_s": ("matrix products", "GFLOP/s")}
Plots = dict[str, list[tuple[str, Path]]]  # captions and files by benchmark


def write_report(reports: list[Report], folder: Path) -> Path:
    """Writes `index.html` and, if matplotlib is installed, the plots into the folder. Returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: Plots = {}
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.plots import draw

        plots = draw(by_benchmark(reports), folder)
    page = folder / "index.html"
    page.write_text(render(reports, plots), encoding="utf-8")
    return page


def by_benchmark(reports: list[Report]) -> dict[str, list[Report]]:
    """The reports that have rows, grouped by benchmark."""
    found: dict[str, list[Report]] = {}
    for each in reports:
        if each["rows"]:
            found.setdefault(each["benchmark"], []).append(each)
    return found


def render(reports: list[Report], plots: Plots) -> str:
    """The page as HTML, with the plots embedded."""
    parts = []
    if any(each["setting"].get("preset") == "tiny" for each in reports):
        parts.append(f"<p class=quick><strong>{QUICK}</strong></p>")
    if reports:
        parts.append(_origin(reports))
    parts.append(f"<h2>How to read this page</h2><p>{READING}</p>")
    if not plots:
        parts.append("<p class=note>No plots: matplotlib is not installed, or there is nothing to draw.</p>")
    parts += [_section(name, group, plots.get(name, [])) for name, group in by_benchmark(reports).items()]
    head = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>llorch_jax benchmarks</title><style>{STYLE}</style></head>"
    )
    return f"{head}<body><h1>llorch_jax benchmarks</h1>{''.join(parts)}</body></html>\n"


def _origin(reports: list[Report]) -> str:
    """When, how and on which machine the figures were measured."""
    machine = reports[0]["machine"]
    times = [each["machine"].get("time", "unknown").replace("T", " ") for each in reports]
    facts = {
        "Measured": times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}",
        "Command": f"<code>{escape(machine.get('command', 'unknown'))}</code>",
        "Commit": f"<code>{escape(machine.get('commit', 'unknown'))}</code>",
        "Processor": f"{escape(machine['processor'])}, {machine['cores']} cores",
        "Versions": ", ".join(f"{name} {machine[name]}" for name in ("python", "jax", "jaxlib", "llorch-jax")),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items()) + "</dl>"


def _section(benchmark: str, group: list[Report], plots: list[tuple[str, Path]]) -> str:
    """The section of one benchmark: description, plots, tables."""
    about = words(benchmark)
    parts = [f"<h2>{escape(about.title)}</h2><p>{escape(about.about)}</p>"]
    for caption, path in plots:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">')
    if benchmark == "compare":
        parts += [_comparison(each) for each in group]
    else:
        parts.append(_rows(group))
    for each in group:
        if benchmark == "profile_cache":
            parts.append(_step_parts(each))
            parts.append(_signals(each))
        if benchmark == "long_context":
            parts.append(_growth(each))
    return "".join(parts) + "".join(f"<p class=note>{escape(_conditions(each))}</p>" for each in group)


def _conditions(figures: Report) -> str:
    """The setting and the machine's limits in words."""
    setting = [f"{SETTINGS.get(key, key)}: {value}" for key, value in figures["setting"].items() if value is not None]
    limits = []
    for key, sample in figures["limits"].items():
        name, unit = LIMITS[key]
        limits.append(f"{name} {number(sample['median'])} {unit} ({_range(sample)})")
    return "; ".join([", ".join(setting), ", ".join(limits)]).removesuffix("; ") + "."


def _range(sample: Report) -> str:
    return f"{number(sample['low'])} to {number(sample['high'])}"


def _sample(sample: Report, unit: str) -> str:
    """A cell: the median, and the spread if there is one."""
    spread = "" if sample["low"] == sample["high"] else f"<small>{_range(sample)}</small>"
    return f"{number(sample['median'])}&nbsp;{unit}{spread}"


def _rows(group: list[Report]) -> str:
    """The table of all rows of a benchmark."""
    about = words(group[0]["benchmark"])
    against = group[0]["against"]
    header = ["", "measured", f"ratio to {against}", against, *(name for name, _ in about.columns)]
    rows = []
    for figures in group:
        for line in figures["rows"]:
            own = [f"{number(line['against'])}&nbsp;{line['unit']}", *(escape(text(line)) for _, text in about.columns)]
            measured = [_sample(line["value"], line["unit"]), _sample(line["ratio"], TIMES)]
            rows.append([escape(about.row(line, figures["setting"])), *measured, *own])
    return _table(header, rows)


def _comparison(figures: Report) -> str:
    """One table per case, with how far the tokens agree, then versions and builds."""
    parts = []
    for kind, title in (("step", "Decode step"), ("prefill", "Prefill")):
        rows = [line for line in figures["rows"] if line["kind"] == kind]
        for case in dict.fromkeys(line["case"] for line in rows):
            parts.append(f"<h3>{title}, {case_words(case)}</h3>")
            lines = [line for line in rows if line["case"] == case]
            parts.append(_table(["", "precision", "time", "ratio"], [_contender(line) for line in lines]))
    header = ["case", "contender", "first greedy tokens that agree"]
    lines = [
        [case_words(a["case"]), escape(a["contender"]), escape(a.get("error") or f"{a['same']} of {a['tokens']}")]
        for a in figures["agreement"]
    ]
    parts.append("<h3>Agreement</h3>" + _table(header, lines))
    versions = ", ".join(f"{name} {value}" for name, value in figures["versions"].items())
    built = "".join(f"<br>{name}: {value}" for name, value in figures.get("builds", {}).items())
    return "".join(parts) + f"<p class=note>{escape(versions)}{built}</p>"


def _contender(line: Report) -> list[str]:
    return [
        escape(line["contender"]),
        line["precision"],
        _sample(line["time"], line["unit"]),
        _sample(line["ratio"], TIMES),
    ]


def _step_parts(figures: Report) -> str:
    """A table with the milliseconds of every part of every step."""
    names = list(figures["rows"][0]["parts"])
    rows = []
    for line in figures["rows"]:
        name = words("profile_cache").row(line, figures["setting"])
        parts = [_sample(line["parts"][part], "ms") for part in names]
        rows.append([escape(name), *parts])
    return "<h3>By part</h3>" + _table(["", *names], rows)


def _signals(figures: Report) -> str:
    rows = [[SIGNALS[key], "yes" if s["on"] else "no", escape(s["value"])] for key, s in figures["signals"].items()]
    return "<h3>Reasons for a separate cache module</h3>" + _table(["reason", "holds", "today"], rows)


def _growth(figures: Report) -> str:
    rows = [
        [f"{escape(layout)} cache", f"{number(each['us_per_token'])}&nbsp;µs", f"{number(each['gb_s'])}&nbsp;GB/s"]
        for layout, each in figures["growth"].items()
        if each
    ]
    return _table(["", "growth per token of context", "bandwidth for keys and values"], rows) if rows else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways on a narrow screen; cells are HTML."""
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{top}</tr>{body}</table></div>"


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    options.add_argument("--out", type=Path, help="folder (next to the first file, with its name)")
    chosen = options.parse_args(argv)
    reports = [each for path in chosen.files for each in read_run(path)]
    print(write_report(reports, chosen.out or chosen.files[0].with_suffix("")))


if __name__ == "__main__":
    main()
