"""The cost of caches that evict or round: KL divergence and perplexity relative to the exact cache, by budget.

    python -m benchmarks.fidelity --text FILE [--model demo] [--policies recent,sinks,h2o,snapkv] [--budgets 32,64,128]
                                  [--caches int8,int4] [--prompt 128] [--length 512] [--rows 8] [--json F] [--plot F]

The text is cut into rows of `--length` tokens. The first `--prompt` tokens of each are read at once, the others one by
one; the predictions from then on are compared.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import llorch_jax as lj
from benchmarks.measure import machine, write_json
from llorch_jax.evaluation.fidelity import Fidelity, fidelity


def measure(model: lj.Model, text: str, caches: list[str], prompt: int, length: int, rows: int) -> dict[str, Any]:
    """The fidelity of each cache on the first rows of a text."""
    ids = np.asarray(model.tokenizer.encode(text), np.int32)
    tokens = ids[: len(ids) // length * length].reshape(-1, length)[:rows]
    if len(tokens) < rows:
        raise SystemExit(f"--text: expected {rows} rows of {length} tokens, got {len(ids)} tokens")
    found = {}
    for spec in caches:
        cache = lj.make_cache(model.config, spec, batch_size=rows)
        found[spec] = fidelity(model.params, model.config, tokens, prompt, cache)
        print(line(spec, found[spec]), flush=True)
    setting = {"model": model.name, "prompt": prompt, "length": length, "rows": rows}
    return {
        "setting": setting,
        "machine": machine(),
        "caches": {spec: dataclasses.asdict(each) for spec, each in found.items()},
    }


def line(spec: str, found: Fidelity) -> str:
    """A row of the table."""
    return (
        f"{spec:<14}{found.kl:>12.2e}{found.agreement:>11.3f}{found.perplexity:>12.3f}"
        f"{found.exact_perplexity:>12.3f}{found.bytes / 1e6:>9.2f}"
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Plots divergence and perplexity over the budget, with one line per policy."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (kl_axes, perplexity_axes) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    specs = {tuple(spec.split(":")): found for spec, found in report["caches"].items()}
    evicting = {spec: found for spec, found in specs.items() if len(spec) == 2 and spec[1].isdecimal()}
    for policy in dict.fromkeys(name for name, _ in evicting):
        budgets = [int(budget) for name, budget in evicting if name == policy]
        found = [evicting[policy, str(budget)] for budget in budgets]
        kl_axes.plot(budgets, [each["kl"] for each in found], marker="o", label=policy)
        perplexity_axes.plot(budgets, [each["perplexity"] for each in found], marker="o", label=policy)
    if evicting:
        perplexity_axes.axhline(next(iter(evicting.values()))["exact_perplexity"], color="black", label="exact")
    kl_axes.set(xlabel="budget, tokens", ylabel="KL(exact || evicting), nats per token", yscale="log")
    perplexity_axes.set(xlabel="budget, tokens", ylabel="perplexity")
    perplexity_axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--policies", default="recent,sinks,h2o,snapkv")
    parser.add_argument("--budgets", default="32,64,128,256")
    parser.add_argument("--caches", default="int8,int4", help="further cache specifications")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(arguments)
    policies, budgets = given.policies.split(","), given.budgets.split(",")
    caches = [f"{policy}:{budget}" for policy in policies for budget in budgets if policy]
    caches += [spec for spec in given.caches.split(",") if spec]
    print(f"{'cache':<14}{'KL, nats':>12}{'agreement':>11}{'perplexity':>12}{'exact':>12}{'MB':>9}")
    report = measure(
        lj.load(given.model), given.text.read_text("utf-8"), caches, given.prompt, given.length, given.rows
    )
    write_json(given.json, report)
    if given.plot:
        plot(report, given.plot)


if __name__ == "__main__":
    main()
