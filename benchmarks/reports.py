"""What every benchmark prints and keeps: rows of a time and its limit, as text and as JSON."""

import argparse
import dataclasses
import datetime
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.limits import BANDWIDTH, GEMM
from benchmarks.measure import Sample, machine, write_json

OUT = Path(__file__).parent / "out"
Report = dict[str, Any]


def parser(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--preset", default="gpt2", help='model with random weights; "tiny" only tests the script')
    options.add_argument("--rounds", type=int, default=rounds, help=f"number of measurements (default: {rounds})")
    options.add_argument("--json", type=Path, help="file for the figures (default: benchmarks/out/NAME-TIME.json)")
    return options


def numbers(text: str) -> list[int]:
    """The numbers of an option, from 1 up, separated by commas."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 up, got {text}")
    return values


def row(name: str, values: Sequence[float], against: Sequence[float], unit: str = "ms", **extra: Any) -> dict[str, Any]:
    """One line of a report: measurements, what each round is compared with, and the ratio, round by round."""
    ratios = [value / other for value, other in zip(values, against, strict=True)]
    summary = {"value": Sample.of(list(values)), "against": statistics.median(against), "ratio": Sample.of(ratios)}
    return {"name": name, "unit": unit, **summary, **extra}


def report(
    name: str, setting: Report, rows: list[Report], values: dict[str, list[float]], against: str = "floor", **extra: Any
) -> Report:
    """All figures of one run of a benchmark.

    Args:
        name: of the benchmark.
        setting: options that the figures depend on.
        rows: from `row`; lower values and ratios are better.
        values: of the rounds; the limits among them go into the report.
        against: what the ratios are to.
        **extra: more figures of this benchmark.
    """
    limits = {"bandwidth_gb_s": BANDWIDTH, "gemm_gflop_s": GEMM}
    measured = {key: Sample.of(values[task]) for key, task in limits.items() if task in values}
    head = {"benchmark": name, "setting": setting, "machine": machine(), "limits": measured, "against": against}
    return plain({**head, "rows": rows, **extra})


def plain(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def spread(sample: Report, digits: int = 2) -> str:
    """A sample from JSON: median, least and most."""
    return f"{sample['median']:.{digits}f} ({sample['low']:.{digits}f} .. {sample['high']:.{digits}f})"


def show(figures: Report, extra: Callable[[Report], str] = lambda row: "") -> None:
    """Prints the rows, with what a benchmark has to add to each."""
    setting = ", ".join(f"{key} {value}" for key, value in figures["setting"].items())
    print(f"== {figures['benchmark']}: {setting}")
    limits = figures["limits"]
    if limits:
        parts = []
        if "bandwidth_gb_s" in limits:
            parts.append(f"{spread(limits['bandwidth_gb_s'], 1)} GB/s read")
        if "gemm_gflop_s" in limits:
            parts.append(f"{spread(limits['gemm_gflop_s'], 0)} GFLOP/s")
        print("machine: " + ", ".join(parts))
    width = max(len(line["name"]) for line in figures["rows"])
    for line in figures["rows"]:
        value = f"{spread(line['value'])} {line['unit']}"
        ratio = f"{spread(line['ratio'])} x {figures['against']} {line['against']:.2f}"
        print(f"{line['name']:<{width}}  {value:<32}  {ratio:<40}  {extra(line)}".rstrip())


def keep(figures: Report, path: Path | None) -> None:
    """Writes a report where the user wants it, or into benchmarks/out with the time in its name."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    write_json(path or OUT / f"{figures['benchmark']}-{stamp}.json", figures)
