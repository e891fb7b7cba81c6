"""A model over many hosts, on paper: what a device holds and exchanges, how long a step takes, where it saturates.

    python -m benchmarks.scaling [--compile] [--hosts 1,2,4,...] [--plot FILE] [--json FILE]

Counts come from a formula; `--compile` also compiles the steps for virtual devices and compares. The cost model is
fitted to the figures of one device in `scaling_model`. `benchmarks.scaling_local` compares predictions and measurements
on this machine; `benchmarks.simulation` simulates replicas behind a router.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reports import Report, keep, numbers, parser, report
from benchmarks.scaling_counts import Case, by_formula, compiled
from benchmarks.scaling_model import (
    BATCHES,
    CONTEXT,
    FITTED,
    HELD_OUT,
    MODELS,
    NETWORKS,
    PREFILLS,
    Host,
    Network,
    Plan,
    device_seconds,
    fit,
    plans,
    prefill_seconds,
    server,
    token_seconds,
    tokens_per_second,
)
from llorch_jax.config import GPT2Config

HOSTS = [1, 2, 4, 5, 8, 16, 25, 32, 64, 128, 256, 512, 1024]
TOKENS, CAPACITY = 512, 1024  # in a row's cache, and the room that it has
ROWS = 16  # of a copy's batch where throughput is what counts
LARGE = GPT2Config(  # the sizes and the number of parameters of Llama 2 70B; two matrices of 43,008 rows for its three
    vocab_size=32000,
    n_positions=4096,
    n_embd=8192,
    n_layer=80,
    n_head=64,
    num_kv_heads=8,
    n_inner=43008,
    tie_word_embeddings=False,
)
SHAPES = {"gpt2-xl": (GPT2Config.from_preset("gpt2-xl"), "float32"), "70B-shaped": (LARGE, "bfloat16")}
DEGREES = {"gpt2-xl": (1, 5, 25), "70B-shaped": (1, 8, 16)}


def count(check: bool) -> list[Report]:
    """What a device holds and exchanges in a step; with `check`, it must be what the compiled programs say."""
    cases = {
        (name, devices): Case(SHAPES[name][0], devices, 1, CAPACITY, SHAPES[name][1])
        for name, degrees in DEGREES.items()
        for devices in degrees
    }
    found = {key: by_formula(case) for key, case in cases.items()}
    if check:
        for (key, expected), counted in zip(found.items(), compiled(list(cases.values())), strict=True):
            if counted != expected:
                raise AssertionError(f"{key}: expected {expected} by the formula, counted {counted}")
    return [
        {"name": name, "devices": devices, **counts._asdict(), "sent": 2 * (devices - 1) / devices * counts.payload}
        for (name, devices), counts in found.items()
    ]


def check_fit(host: Host) -> list[Report]:
    """Measured and modelled milliseconds on one device."""
    gpt2 = MODELS["gpt2"]
    steps = {**FITTED, **{f"{name} (not fitted)": ms for name, ms in HELD_OUT.items()}}
    rows = [
        (name, ms, device_seconds(host, MODELS[name.removesuffix(" (not fitted)")], 1, CONTEXT))
        for name, ms in steps.items()
    ]
    rows += [(f"gpt2, batch {batch}", ms, device_seconds(host, gpt2, batch, CONTEXT)) for batch, ms in BATCHES.items()]
    rows += [(f"gpt2, prefill {n}", ms, prefill_seconds(host, gpt2, n, 0)) for n, ms in PREFILLS.items()]
    return [{"name": name, "measured": ms, "modelled": 1000 * seconds} for name, ms, seconds in rows]


def predict(host: Host, network: Network, name: str, hosts: int) -> Report | None:
    """The plans with the fastest step of one row and with the highest throughput; None if the model does not fit."""
    config, dtype = SHAPES[name]
    ways = plans(host, config, hosts, 1, CAPACITY, dtype)
    busy = plans(host, config, hosts, ROWS, CAPACITY, dtype)
    if not ways or not busy:
        return None

    def seconds(plan: Plan, cut_output: bool = False) -> float:
        return token_seconds(host, network, config, plan, 1, TOKENS, dtype, cut_output)

    def throughput(plan: Plan) -> float:
        return tokens_per_second(host, network, config, plan, ROWS, TOKENS, dtype)

    fast, much = min(ways, key=seconds), max(busy, key=throughput)
    return {
        "hosts": hosts,
        "ms": 1000 * seconds(fast),
        "fast": fast,
        "ms_output_cut": 1000 * seconds(fast, True),
        "tokens_per_second": throughput(much),
        "much": much,
    }


def measure(hosts: Sequence[int], check: bool) -> Report:
    """All tables."""
    here = fit()
    predictions = [
        {"host": machine.name, "network": network.name, "name": name, **found}
        for machine in (here, server(here))
        for name in SHAPES
        for network in NETWORKS
        for number in hosts
        if (found := predict(machine, network, name, number)) is not None
    ]
    extra: dict[str, Any] = {"host": dataclasses.asdict(here), "counts": count(check), "fit": check_fit(here)}
    return report("scaling", {"compiled": check, "tokens": TOKENS}, predictions, {}, **extra)


def show(figures: Report) -> None:
    """Prints all tables."""
    print("== one device of a tensor-parallel step: MB held, all-reduces, KB in them, KB sent around a ring")
    for line in figures["counts"]:
        print(
            f"{line['name']:<12}{line['devices']:>4} devices {line['held'] / 1e6:>10,.1f} {line['collectives']:>5} "
            f"{line['payload'] / 1e3:>9,.1f} {line['sent'] / 1e3:>9,.1f}"
        )
    print(f"== the fit: {figures['host']}")
    for line in figures["fit"]:
        ratio = line["modelled"] / line["measured"]
        print(f"{line['name']:<26}{line['measured']:>8.1f} ms measured {line['modelled']:>8.1f} modelled {ratio:>6.2f}")
    group = None
    for line in figures["rows"]:
        if group != (group := (line["name"], line["host"], line["network"])):
            print(f"== {', '.join(group)}: ms per token, throughput with {ROWS} rows; data x tensor x stages")
        fast, much = (" x ".join(str(n) for n in line[key]) for key in ("fast", "much"))
        print(
            f"{line['hosts']:>5} {line['ms']:>8.1f} ms {fast:<12} (output cut too: {line['ms_output_cut']:.1f})   "
            f"{line['tokens_per_second']:>10,.0f} tokens/s {much}"
        )


def plot(figures: Report, path: Path) -> None:
    """Milliseconds per token over the number of hosts, a panel per model and host, a line per network."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    machines = list(dict.fromkeys(line["host"] for line in figures["rows"]))
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained", sharex=True)
    for column, machine in enumerate(machines):
        for axes, name in zip(panels[:, column], SHAPES, strict=True):
            for network in NETWORKS:
                own = [
                    line
                    for line in figures["rows"]
                    if (line["host"], line["name"], line["network"]) == (machine, name, network.name)
                ]
                axes.plot([line["hosts"] for line in own], [line["ms"] for line in own], marker=".", label=network.name)
            axes.set(yscale="log", title=f"{name}, hosts: {machine}")
            axes.set_xscale("log", base=2)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.grid(alpha=0.3, which="both")
    for axes in panels[:, 0]:
        axes.set(ylabel="ms per token, one row")
    for axes in panels[1]:
        axes.set(xlabel="hosts")
    panels[0, 1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--compile", action="store_true", help="count in compiled programs too, which takes minutes")
    options.add_argument("--hosts", type=numbers, default=HOSTS)
    options.add_argument("--plot", type=Path, help="file for a plot; needs matplotlib")
    chosen = options.parse_args(argv)
    figures = measure(chosen.hosts, chosen.compile)
    show(figures)
    keep(figures, chosen.json)
    if chosen.plot:
        plot(figures, chosen.plot)


if __name__ == "__main__":
    main()
