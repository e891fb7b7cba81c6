"""The time that a pool of caches saves: making a new cache or reusing a released one, compared with a decode step.

    python -m benchmarks.pool [--preset gpt2] [--batch 1] [--rounds 15] [--json FILE]

Both take turns, and are measured until the buffers exist and have been written once, as by a prefill.
"""

import time
from functools import partial
from typing import Any

import jax
import numpy as np

import llorch_jax as lj
from benchmarks.measure import Sample, interleaved, machine, random_model, write_json
from benchmarks.reports import parser


def measure(preset: str, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of making a cache, of acquiring and releasing one, and of a decode step."""
    config, params = random_model(preset)
    pool = lj.CachePool()
    token = np.zeros(batch, np.int32)
    settings = {"batch_size": batch, "capacity": config.n_positions}
    step = partial(lj.decode_step, params, config, token)
    caches = [lj.StaticCache.init(config, **settings)]

    def made() -> float:
        start = time.perf_counter()
        jax.block_until_ready(lj.StaticCache.init(config, **settings))
        return 1000 * (time.perf_counter() - start)

    def pooled() -> float:
        start = time.perf_counter()
        pool.release(jax.block_until_ready(pool.acquire(lj.StaticCache, config, **settings)))
        return 1000 * (time.perf_counter() - start)

    def stepped() -> float:
        start = time.perf_counter()
        caches[0] = jax.block_until_ready(step(caches[0]))[1].clear()
        return 1000 * (time.perf_counter() - start)

    times = interleaved({"init": made, "acquire and release": pooled, "decode step": stepped}, rounds)
    samples = {name: Sample.of(values) for name, values in times.items()}
    return {"setting": {"preset": preset, "batch": batch}, "machine": machine(), "ms": samples}


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, rounds=15)
    options.add_argument("--batch", type=int, default=1)
    given = options.parse_args(argv)
    report = measure(given.preset, given.batch, given.rounds)
    for name, sample in report["ms"].items():
        print(f"{name:<20}{sample} ms")
    write_json(given.json, report)


if __name__ == "__main__":
    main()
