"""Tools of all benchmarks: repeated timing, models with random weights, a description of the machine."""

import dataclasses
import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import llorch_jax as lj
from llorch_jax.cores import usable_cores


@dataclasses.dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing: median, smallest and largest, in the unit of the field that holds it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Sample":
        """The summary of some values."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:8.2f}  ({self.low:.2f} .. {self.high:.2f})"


def seconds(run: Callable[[], Any]) -> float:
    """Seconds that one call takes until its results are available."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleaved(tasks: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The results of each task in each round; a first round warms up and is discarded.

    Tasks take turns, so that a change in the machine's speed affects all of them.
    """
    values: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            value = task()
            if number:
                values[name].append(value)
    return values


TINY = lj.GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2)


def preset_config(preset: str) -> lj.GPT2Config:
    """A preset, or "tiny": a model for trying out the benchmarks, whose figures are meaningless."""
    return TINY if preset == "tiny" else lj.GPT2Config.from_preset(preset)


def random_model(preset: str, layers: int | None = None) -> tuple[lj.GPT2Config, lj.Params]:
    """A preset, or "tiny", with random weights, and with another number of blocks if one is given."""
    config = preset_config(preset)
    config = dataclasses.replace(config, n_layer=layers or config.n_layer)
    return config, jax.block_until_ready(_random_params(config, jax.random.key(0)))


_random_params = jax.jit(lj.init_params, static_argnums=0)


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured, the command and the commit."""
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "processor": _processor(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "llorch-jax")},
    }


def _commit() -> str:
    """The commit that is checked out, with "+" if files differ from it; "unknown" outside a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Writes the report as JSON to a file, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2, default=dataclasses.asdict) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
