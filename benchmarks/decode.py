"""Speed of the decoding loop of a preset with random weights.

    python -m benchmarks.decode [--preset gpt2] [--batch 1] [--prompt 64] [--new 64] [--capacity N] [--cache static]

The ratio is relative to the time that reading the weights and the live keys and values takes at the bandwidth measured
in the same round (benchmarks/limits.py).
"""

from collections.abc import Sequence

from benchmarks.decoder import Decoder, make_cache
from benchmarks.limits import Limits, step_bytes, step_floors
from benchmarks.measure import interleaved, random_model
from benchmarks.reports import Report, keep, parser, report, row, show


def measure(preset: str, batch: int, prompt: int, new: int, capacity: int | None, layout: str, rounds: int) -> Report:
    """All figures for one setting."""
    config, params = random_model(preset)
    capacity = capacity or min(prompt + new, config.n_positions)
    cache = make_cache(config, layout, batch, capacity)
    decoder = Decoder(params, config, cache, prompt, new)
    compiled = decoder.compile()
    values = interleaved({**Limits.of(preset).tasks(), "step": decoder.step_ms}, rounds)
    floors = step_floors(values, step_bytes(config, params, batch, prompt + (new + 1) / 2))
    line = row("decode step", values["step"], floors)
    line |= {"tokens_per_second": 1000 * batch / line["value"].median, "compile_s": compiled}
    setting = {"preset": preset, "batch": batch, "prompt": prompt, "new": new, "capacity": capacity, "cache": layout}
    return report("decode", setting, [line], values)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=64)
    options.add_argument("--capacity", type=int, help="slots of the cache, rounded up to a bucket (prompt + new)")
    options.add_argument("--cache", default="static", help="layout, or layout/codec such as paged/int8")
    chosen = options.parse_args(argv)
    setting = (chosen.preset, chosen.batch, chosen.prompt, chosen.new, chosen.capacity, chosen.cache)
    figures = measure(*setting, chosen.rounds)
    show(figures, lambda row: f"{row['tokens_per_second']:.1f} tokens/s, loop compiled in {row['compile_s']:.1f} s")
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
