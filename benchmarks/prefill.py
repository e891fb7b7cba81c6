"""Speed of prefill by length of the prompt, for a preset with random weights.

    python -m benchmarks.prefill [--preset gpt2] [--batch 1] [--prompts 64,512]

The ratio is relative to the time that the floating-point operations take at the speed of a large matrix product,
measured in the same round; its inverse is the share of that peak.
"""

from collections.abc import Callable, Sequence

import jax

import llorch_jax as lj
from benchmarks.decoder import random_tokens
from benchmarks.limits import Limits, prefill_floors, prefill_flops
from benchmarks.measure import interleaved, random_model, seconds
from benchmarks.reports import Report, keep, numbers, parser, report, row, show


def measure(preset: str, batch: int, prompts: list[int], rounds: int) -> Report:
    """One row per length of the prompt."""
    config, params = random_model(preset)
    tasks = {str(count): prefill_task(params, config, batch, count) for count in prompts}
    values = interleaved({**Limits.of(preset).tasks(), **tasks}, rounds)
    rows = []
    for count in prompts:
        line = row(f"prefill {count}", values[str(count)], prefill_floors(values, prefill_flops(config, batch, count)))
        line["tokens"] = count
        line["share_of_peak"] = 1 / line["ratio"].median
        line["tokens_per_second"] = 1000 * batch * count / line["value"].median
        rows.append(line)
    return report("prefill", {"preset": preset, "batch": batch}, rows, values)


def prefill_task(params: lj.Params, config: lj.GPT2Config, batch: int, count: int) -> Callable[[], float]:
    """Milliseconds of one prefill per call, always into the same cache, which has just enough room for these tokens."""
    tokens = jax.device_put(random_tokens(config, batch, count))
    caches = [lj.StaticCache.init(config, batch_size=batch, capacity=count)]

    def run() -> float:
        empty = jax.block_until_ready(caches.pop().clear())
        results = []
        elapsed = seconds(lambda: results.append(lj.prefill(params, config, tokens, empty)) or results)
        caches.append(results[0][1])
        return 1000 * elapsed

    return run


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--prompts", type=numbers, default=[64, 512], help="comma-separated numbers of tokens")
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, chosen.batch, chosen.prompts, chosen.rounds)
    show(figures, lambda row: f"{row['share_of_peak']:.2f} of peak, {row['tokens_per_second']:.0f} tokens/s")
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
