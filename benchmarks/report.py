"""One self-contained HTML page, and PNG plots, of the figures of a run.

    python -m benchmarks.report RUN.json [FILE.json ...] [--out FOLDER]

Takes files of whole runs and of single benchmarks. Plots need matplotlib: pip install '.[plots]'.
"""

import argparse
import base64
import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.check import read_run
from benchmarks.reports import Report, spread

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "td+td{font-variant-numeric:tabular-nums}img{max-width:100%}.note{color:#666}"
)


def write_report(reports: list[Report], folder: Path) -> Path:
    """Writes `index.html` and, where matplotlib is there, the plots into the folder. Returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {}
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.plots import draw

        plots = draw(reports, folder)
    page = folder / "index.html"
    page.write_text(_page(reports, plots), encoding="utf-8")
    return page


def _page(reports: list[Report], plots: dict[str, Path]) -> str:
    machine = reports[0]["machine"] if reports else {}
    parts = [f"<p class=note>{html.escape(', '.join(f'{key} {value}' for key, value in machine.items()))}</p>"]
    for title, path in plots.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    if not plots:
        parts.append("<p class=note>No plots: matplotlib is not installed, or there is nothing to draw.</p>")
    parts += [_section(each) for each in reports]
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>llorch_jax benchmarks</title><style>{STYLE}</style>"
    )
    return f"{head}<h1>llorch_jax benchmarks</h1>{''.join(parts)}</html>\n"


def _section(figures: Report) -> str:
    setting = ", ".join(f"{key} {value}" for key, value in figures["setting"].items())
    limits = ", ".join(f"{key} {spread(value, 1)}" for key, value in figures["limits"].items())
    header = ("", "measured", "ratio", f"to {figures['against']}")
    rows = [
        (line["name"], f"{spread(line['value'])} {line['unit']}", spread(line["ratio"]), f"{line['against']:.2f}")
        for line in figures["rows"]
    ]
    text = f"<h2>{figures['benchmark']}</h2><p class=note>{html.escape(setting)}<br>{html.escape(limits)}</p>"
    text += _table(header, rows)
    if "signals" in figures:
        signals = figures["signals"].items()
        text += _table(("signal", "", ""), [(key, "yes" if s["on"] else "no", s["value"]) for key, s in signals])
    if figures["benchmark"] == "profile_cache":
        for line in figures["rows"]:
            parts = line["parts"].items()
            text += _table((f"{line['name']}: part of a step", "ms"), [(name, spread(part)) for name, part in parts])
    if "agreement" in figures:
        lines = [
            (a["case"], a["contender"], a.get("error") or f"{a['same']} / {a['tokens']}") for a in figures["agreement"]
        ]
        text += _table(("case", "contender", "first greedy tokens that agree"), lines)
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    return f"<table>{cells('th', header)}{''.join(cells('td', row) for row in rows)}</table>"


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    options.add_argument("--out", type=Path, help="folder (beside the first file, with its name)")
    chosen = options.parse_args(argv)
    reports = [each for path in chosen.files for each in read_run(path)]
    print(write_report(reports, chosen.out or chosen.files[0].with_suffix("")))


if __name__ == "__main__":
    main()
