"""Runs the benchmarks, saves their figures, and draws a report.

    python -m benchmarks [--quick] [--only NAME,NAME] [--peer NAME=PYTHON] [--weights float32,int8]
                         [--check BASELINE.json] [--run RUN.json]

The figures of a run are written to benchmarks/out/run-TIME.json, the report to a folder of the same name. With --check
the exit code is 1 if a ratio is worse than in the baseline by more than the spread of both; with --run the figures are
read instead of measured.
"""

import argparse
import contextlib
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import suite
from benchmarks.agreement import tell_agreement
from benchmarks.check import read_run, regressions
from benchmarks.compare import peer_option, precisions
from benchmarks.measure import write_json
from benchmarks.profile_cache import tell_parts, tell_signals
from benchmarks.report import write_report
from benchmarks.reports import OUT, Report, show


def main(argv: Sequence[str] | None = None) -> int:
    options = _options()
    chosen = options.parse_args(argv)
    known = (suite.quick if chosen.quick else suite.full)(dict(chosen.peer), chosen.weights)
    names = chosen.only.split(",") if chosen.only else [n for n in known if n != "compare" or chosen.peer]
    if unknown := [name for name in names if name not in known]:
        options.error(f"--only: expected some of {', '.join(known)}; got {unknown[0]}")
    code = 0
    if chosen.run:
        path = chosen.run
        reports = read_run(path)
    else:
        path = chosen.out / f"run-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
        reports = []
        with suite.hasty_compiling() if chosen.quick else contextlib.nullcontext():
            for name in names:
                reports.append(known[name]())
                code = max(code, _tell(reports[-1]))
                write_json(path, {"reports": reports})  # after each, so that a run that ends early is not lost
    print(f"figures: {path}")
    print(f"report:  {write_report(reports, path.with_suffix(''))}")
    return max(code, _check(chosen.check, reports) if chosen.check else 0)


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="tiny model: only checks that everything runs")
    options.add_argument("--only", help="names of benchmarks, separated by commas")
    options.add_argument("--peer", type=peer_option, action="append", default=[], metavar="NAME=PYTHON")
    options.add_argument(
        "--weights", type=precisions, default=["float32"], help="our precisions in `compare` (default: float32)"
    )
    options.add_argument("--check", type=Path, metavar="BASELINE.json", help="earlier run to compare with")
    options.add_argument("--run", type=Path, metavar="RUN.json", help="read the figures of a run instead of measuring")
    options.add_argument("--out", type=Path, default=OUT, help="folder for the results (default: benchmarks/out)")
    return options


def _tell(figures: Report) -> int:
    """Prints a report; returns 1 if a comparison found different tokens."""
    show(figures)
    if figures["benchmark"] == "profile_cache":
        tell_parts(figures)
        tell_signals(figures)
    return tell_agreement(figures) if figures["benchmark"] == "compare" else 0


def _check(baseline: Path, reports: list[Report]) -> int:
    worse, compared = regressions(read_run(baseline), reports)
    for line in worse:
        print(f"worse: {line}")
    print(f"check: {compared} rows compared with {baseline}, {len(worse)} worse")
    if compared == 0:
        print("check: nothing to compare; the baseline has other benchmarks or settings")
    return int(bool(worse) or compared == 0)


if __name__ == "__main__":
    sys.exit(main())
