"""The output of every benchmark: rows with a time and its limit, as text and as JSON."""

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
    """An option's comma-separated numbers, each 1 or more."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of 1 or more, got {text}")
    return values


def row(name: str, values: Sequence[float], against: Sequence[float], unit: str = "ms", **extra: Any) -> dict[str, Any]:
    """One row of a report: measurements, the value to which each round is compared, and the ratio, round by round."""
    ratios = [value / other for value, other in zip(values, against, strict=True)]
    summary = {"value": Sample.of(list(values)), "against": statistics.median(against), "ratio": Sample.of(ratios)}
    return {"name": name, "unit": unit, **summary, **extra}


def report(
    name: str, setting: Report, rows: list[Report], values: dict[str, list[float]], against: str = "floor", **extra: Any
) -> Report:
    """All figures of one run of a benchmark.

    Args:
        name: name of the benchmark.
        setting: options that the figures depend on.
        rows: made by `row`; lower values and ratios are better.
        values: values of the rounds, whose limits go into the report.
        against: what the ratios are relative to.
        **extra: further figures of this benchmark.
    """
    limits = {"bandwidth_gb_s": BANDWIDTH, "gemm_gflop_s": GEMM}
    measured = {key: Sample.of(values[task]) for key, task in limits.items() if task in values}
    head = {"benchmark": name, "setting": setting, "machine": machine(), "limits": measured, "against": against}
    return plain({**head, "rows": rows, **extra})


def plain(value: Any) -> Any:
    """The value as it is after a round trip through JSON."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def spread(sample: Report, digits: int = 2) -> str:
    """A sample from JSON as text: median, minimum and maximum."""
    return f"{sample['median']:.{digits}f} ({sample['low']:.{digits}f} .. {sample['high']:.{digits}f})"


def show(figures: Report, extra: Callable[[Report], str] = lambda row: "") -> None:
    """Prints the rows, each with the benchmark's additions."""
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
    """Writes a report where the user wants it, or to benchmarks/out with the time in its name."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    write_json(path or OUT / f"{figures['benchmark']}-{stamp}.json", figures)
