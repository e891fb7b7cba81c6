"""How a decode step grows with the batch and with the number of layers.

    python -m benchmarks.batch [--preset gpt2] [--batches 1,2,4,8,16,32] [--layers 12,24,36,48] [--prompt 64] [--new 16]

Compares each step with its floor (reading the weights once, and each row's keys and values) and with the first step of
its series.
"""

import dataclasses
import statistics
from collections.abc import Sequence

import llorch_jax as lj
from benchmarks.decoder import Decoder
from benchmarks.limits import Limits, step_bytes, step_floors
from benchmarks.measure import interleaved, preset_config, random_model
from benchmarks.reports import Report, keep, numbers, parser, report, row, show


def measure(preset: str, batches: list[int], layers: list[int], prompt: int, new: int, rounds: int) -> Report:
    """One row per batch size, with the preset's number of layers, and one per number of layers, with a batch of 1."""
    base = preset_config(preset).n_layer
    config, params = random_model(preset, max([base, *layers]))
    decoders = {f"batch {size}": _decoder(config, params, base, size, prompt, new) for size in batches}
    decoders |= {f"layers {count}": _decoder(config, params, count, 1, prompt, new) for count in layers}
    compiled = {name: decoder.compile() for name, decoder in decoders.items()}
    steps = {name: decoder.step_ms for name, decoder in decoders.items()}
    values = interleaved({**Limits.of(preset).tasks(), **steps}, rounds)
    rows = []
    for series, sizes in (("batch", batches), ("layers", layers)):
        for size in sizes:
            name = f"{series} {size}"
            first = values[f"{series} {sizes[0]}"]
            decoder = decoders[name]
            batch = size if series == "batch" else 1
            floors = step_floors(values, step_bytes(decoder.config, decoder.params, batch, prompt + (new + 1) / 2))
            line = row(name, values[name], floors, series=series, size=size, compile_s=compiled[name])
            line["to_first"] = statistics.median(a / b for a, b in zip(values[name], first, strict=True))
            line["tokens_per_second"] = 1000 * batch / line["value"].median
            rows.append(line)
    return report("batch", {"preset": preset, "prompt": prompt, "new": new}, rows, values)


def _decoder(config: lj.GPT2Config, params: lj.Params, layers: int, batch: int, prompt: int, new: int) -> Decoder:
    """A decoder with only the first blocks of the model."""
    config = dataclasses.replace(config, n_layer=layers)
    params = params.replace(blocks=params.blocks[:layers])
    capacity = min(prompt + new, config.n_positions)
    return Decoder(params, config, lj.StaticCache.init(config, batch_size=batch, capacity=capacity), prompt, new)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--batches", type=numbers, default=[1, 2, 4, 8, 16, 32])
    options.add_argument("--layers", type=numbers, default=[12, 24, 36, 48])
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=16)
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, chosen.batches, chosen.layers, chosen.prompt, chosen.new, chosen.rounds)
    show(
        figures,
        lambda row: (
            f"{row['to_first']:.2f} x the first, {row['tokens_per_second']:.1f} tokens/s, "
            f"compiled in {row['compile_s']:.1f} s"
        ),
    )
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
