"""Whether a run is worse than an earlier one, judged by ratios, since these carry over to machines of other speeds."""

import json
from pathlib import Path

from benchmarks.reports import Report

TOLERANCE = 0.02  # share of the ratio, beyond the spread


def read_run(path: Path) -> list[Report]:
    """The reports in a file: those of a whole run, or that of a single benchmark."""
    content = json.loads(path.read_text())
    return content.get("reports", [content])


def regressions(baseline: list[Report], run: list[Report]) -> tuple[list[str], int]:
    """Descriptions of the rows that got worse, and how many rows were compared.

    A row is worse if the smallest of its ratios exceeds the largest of the baseline's by more than `TOLERANCE`. Rows
    are compared if benchmark, setting and name are the same.
    """
    before = _rows(baseline)
    found = []
    compared = 0
    for key, new in _rows(run).items():
        if key not in before:
            continue
        compared += 1
        old = before[key]
        if new["low"] > old["high"] * (1 + TOLERANCE):
            found.append(
                f"{key[0]}, {key[2]}: ratio {new['median']:.3f}, at least {new['low']:.3f}; "
                f"it was {old['median']:.3f}, at most {old['high']:.3f}"
            )
    return found, compared


def _rows(reports: list[Report]) -> dict[tuple[str, str, str], Report]:
    """The ratios by benchmark, setting and name."""
    return {
        (each["benchmark"], json.dumps(each["setting"], sort_keys=True), row["name"]): row["ratio"]
        for each in reports
        for row in each["rows"]
    }
