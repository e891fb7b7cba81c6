"""Decode steps and prefills of one device, to which the cost model of `scaling_model` is fitted, and some to check it.

    python -m benchmarks.scaling_measure [--only "NAME;NAME"] [--rounds 5] [--json FILE]

Models of several widths and depths separate the cost of a byte from that of a block. Weights are random, in float32.
"""

from collections.abc import Callable, Sequence

import jax

import llorch_jax as lj
from benchmarks.decoder import Decoder
from benchmarks.measure import interleaved
from benchmarks.prefill import prefill_task
from benchmarks.reports import Report, keep, parser, report, row, show
from benchmarks.scaling_model import BATCHES, MODELS, PREFILLS

CONTEXT, NEW = 64, 16  # tokens in the cache before a measured loop, and steps of it


def measure(names: Sequence[str], rounds: int) -> Report:
    """One row per model with a batch of 1, for gpt2 also per batch; per prompt where a name ends in "prefill"."""
    tasks: dict[str, Callable[[], float]] = {}
    for name in names:
        config = MODELS[name.removesuffix(" prefill")]
        params = jax.block_until_ready(jax.jit(lj.init_params, static_argnums=0)(config, jax.random.key(0)))
        if name.endswith(" prefill"):
            tasks |= {f"{name} {count}": prefill_task(params, config, 1, count) for count in PREFILLS}
            continue
        for batch in (1, *BATCHES) if name == "gpt2" else (1,):
            cache = lj.StaticCache.init(config, batch_size=batch, capacity=CONTEXT + NEW)
            task = f"{name}, batch {batch}" if batch > 1 else name
            tasks[task] = Decoder(params, config, cache, CONTEXT, NEW).step_ms
    values = interleaved(tasks, rounds)
    rows = [row(name, own, [min(own)] * rounds) for name, own in values.items()]
    return report("scaling_measure", {"context": CONTEXT, "new": NEW}, rows, {}, "least")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--only", default=";".join(MODELS), help="names of models, separated by semicolons")
    chosen = options.parse_args(argv)
    figures = measure(chosen.only.split(";"), chosen.rounds)
    show(figures)
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
