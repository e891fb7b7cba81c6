"""The four signals that a KV cache should be a module separate from attention, with their values."""

from pathlib import Path
from typing import Any

import llorch_jax as lj

THRESHOLD = 0.2  # maximum share of a decode step that cache operations may take inside attention
ROOT = Path(lj.__file__).parent
DOCS = ROOT.parent / "docs" / "caches.md"

# Documented features of caches that a few lines inside attention could not provide, with their public names.
PROMISES = {
    "rows that share memory": "PagedCache",
    "reuse between calls": "CachePool",
    "saving and loading": "save_cache",
    "exact memory plans": "plan_memory",
    "rounded storage": "QuantizedCache",
    "bounded memory": "RotatingCache",
}


def signals(shares: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each signal, whether it is on and its value in words.

    Args:
        shares: for layouts at lengths, `layout`, `length`, and the `share` of updates and reads in the decode step.
    """
    over = [f"{line['layout']} at {line['length']}" for line in shares if line["share"] > THRESHOLD]
    most = max(shares, key=lambda line: line["share"])
    strategies = sorted(name for name in lj.__all__ if name.endswith("Cache") and name != "KVCache")
    own = _lines("cache/**/*.py")
    attention = _lines("attention.py")
    kept = [promise for promise, name in PROMISES.items() if hasattr(lj, name) and name in _documented()]
    highest = f"the largest is {100 * most['share']:.1f} % ({most['layout']} at {most['length']} tokens)"
    return {
        "performance": _signal(bool(over), f"over {100 * THRESHOLD:.0f} %: {', '.join(over) or 'none'}; {highest}"),
        "features": _signal(len(strategies) > 1, f"{len(strategies)} strategies: {', '.join(strategies)}"),
        "code": _signal(own > attention, f"{own} lines of code in cache/, {attention} in attention.py"),
        "requirements": _signal(bool(kept), f"documented and there: {', '.join(kept) or 'none'}"),
    }


def _signal(on: bool, value: str) -> dict[str, Any]:
    return {"on": on, "value": value}


def _lines(pattern: str) -> int:
    """Lines that are not empty in the package's files of this pattern."""
    return sum(bool(line.strip()) for path in ROOT.glob(pattern) for line in path.read_text().splitlines())


def _documented() -> str:
    return DOCS.read_text() if DOCS.exists() else ""
