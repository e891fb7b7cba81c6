"""Milliseconds per token by length of the text, from 64 to 1,024 tokens.

    python -m benchmarks.long_context [--preset gpt2] [--lengths 64,128,256,512,1000] [--layouts static,dynamic]

Caches have room for the whole context. The floor grows with the live keys and values; the last lines say how fast the
measured time grows with them.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.decoder import Decoder, make_cache
from benchmarks.limits import Limits, kv_bytes, step_bytes, step_floors
from benchmarks.measure import interleaved, random_model
from benchmarks.reports import Report, keep, numbers, parser, report, row, show


def measure(preset: str, batch: int, lengths: list[int], layouts: list[str], new: int, rounds: int) -> Report:
    """One row per layout and length, and the growth for each layout."""
    config, params = random_model(preset)
    decoders = {}
    for layout in layouts:
        for length in lengths:
            cache = make_cache(config, layout, batch)
            decoders[f"{layout} {length}"] = Decoder(params, config, cache, length, new)
    steps = {name: decoder.step_ms for name, decoder in decoders.items()}
    values = interleaved({**Limits.of(preset).tasks(), **steps}, rounds)
    rows = []
    for layout in layouts:
        for length in lengths:
            name = f"{layout} {length}"
            floors = step_floors(values, step_bytes(config, params, batch, length + (new + 1) / 2))
            rows.append(row(name, values[name], floors, layout=layout, length=length))
    growth = {layout: _growth(rows, layout, batch * kv_bytes(config)) for layout in layouts}
    return report("long_context", {"preset": preset, "batch": batch, "new": new}, rows, values, growth=growth)


def _growth(rows: list[Report], layout: str, token_bytes: int) -> dict[str, float]:
    """Microseconds per token of context (least squares over the medians), and the corresponding bandwidth."""
    points = [(line["length"], line["value"].median) for line in rows if line["layout"] == layout]
    if len(points) < 2:
        return {}
    slope = float(np.polyfit(*zip(*points, strict=True), 1)[0])  # ms per token
    return {"us_per_token": 1000 * slope, "gb_s": token_bytes / slope / 1e6}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--lengths", type=numbers, default=[64, 128, 256, 512, 1000])
    options.add_argument("--layouts", default="static,dynamic", help="comma-separated cache layouts")
    options.add_argument("--new", type=int, default=16)
    chosen = options.parse_args(argv)
    layouts = chosen.layouts.split(",")
    figures = measure(chosen.preset, chosen.batch, chosen.lengths, layouts, chosen.new, chosen.rounds)
    show(figures)
    for layout, growth in figures["growth"].items():
        if growth:
            print(f"{layout}: {growth['us_per_token']:.2f} us per token of context, {growth['gb_s']:.1f} GB/s")
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
