"""A tensor-parallel step on one machine's virtual devices and processes, against the cost model's prediction.

    python -m benchmarks.scaling_local [--preset gpt2] [--counts 2,4] [--kinds devices,processes] [--rounds 3]
                                       [--prefix "chrt -f 10"] [--json FILE]

Devices on one machine share its memory bandwidth: the prediction for n of them is the step of one device, times the
bytes that n of them read over those that one reads, plus the collectives, each as long as one of the same size measured
alone in the same process. The model is spread by `shard`, with the native kernels where these are built. `--prefix` is
put before the command of every child process.
"""

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import preset_config, seconds
from benchmarks.reports import Report, keep, numbers, parser, report, row, show
from benchmarks.scaling_counts import Case, by_formula
from benchmarks.scaling_model import read_bytes
from llorch_jax.config import GPT2Config

CAPACITY, STEPS = 128, 16


def predicted_ms(preset: str, devices: int, one_ms: float, collective_ms: float) -> float:
    """Milliseconds of a step of devices that share one memory."""
    config = preset_config(preset)
    capacity = _capacity(config)
    bytes_of_all = devices * read_bytes(config, 1, capacity, tensor=devices)
    share = bytes_of_all / read_bytes(config, 1, capacity)
    return one_ms * share + by_formula(Case(config, devices, 1, capacity)).collectives * collective_ms


def _capacity(config: GPT2Config) -> int:
    return min(CAPACITY, config.n_positions)


def measure(preset: str, counts: Sequence[int], kinds: Sequence[str], rounds: int, prefix: Sequence[str]) -> Report:
    """A row per number and kind of devices: those of one process, and those of as many processes."""
    one = _run(preset, 1, 1, rounds, prefix)
    rows = [row("1 device", one["step_ms"], [statistics.median(one["step_ms"])] * rounds, collective_ms=0.0)]
    for count in counts:
        for processes in [{"devices": 1, "processes": count}[kind] for kind in kinds]:
            found = _run(preset, count, processes, rounds, prefix)
            expected = predicted_ms(preset, count, statistics.median(one["step_ms"]), found["collective_ms"])
            name = f"{count} processes" if processes > 1 else f"{count} devices of one process"
            line = row(name, found["step_ms"], [expected] * rounds, collective_ms=found["collective_ms"])
            rows.append(line)
    return report("scaling_local", {"preset": preset, "prefix": shlex.join(prefix)}, rows, {}, "predicted")


def _run(preset: str, devices: int, processes: int, rounds: int, prefix: Sequence[str]) -> Report:
    """What the first process has measured."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    child = [*prefix, sys.executable, "-m", "benchmarks.scaling_local", "--preset", preset, "--rounds", str(rounds)]
    running = []
    for number in range(processes):
        place = json.dumps([devices, processes, number, address])
        command = [*child, "--child", place]
        running.append(
            subprocess.Popen(command, env=env, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
        )
    try:
        texts = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        raise RuntimeError(f"{devices} devices: a child process failed, see above")
    return json.loads(texts[0].splitlines()[-1])


def _child(preset: str, rounds: int, devices: int, processes: int, number: int, address: str) -> None:
    """Measures as one of the processes, and prints the figures."""
    import jax

    if processes > 1:
        jax.distributed.initialize(address, processes, number)
    step, collective = _step_task(preset, devices), _collective_task(preset, devices)
    step()
    collective()
    steps = [1000 * seconds(step) / STEPS for _ in range(rounds)]
    alone = statistics.median(1000 * seconds(collective) for _ in range(5 * rounds))
    print(json.dumps({"step_ms": steps, "collective_ms": alone / STEPS}))


def _step_task(preset: str, devices: int) -> Any:
    """A function that runs `STEPS` decode steps of a model spread by `shard`."""
    import jax
    import jax.numpy as jnp

    import llorch_jax as lj
    from llorch_jax.cache.placement import new_cache, placed
    from llorch_jax.decoding import steps

    config, mesh = preset_config(preset), lj.make_mesh(model=devices)
    model = lj.shard(lj.Model(config, lj.init_params(config, jax.random.key(0))), mesh)
    token = placed(mesh, jnp.zeros(1, jnp.int32))
    kept = [new_cache(mesh, lj.StaticCache.init, model.config, batch_size=1, capacity=_capacity(model.config))]

    def run() -> Any:
        for _ in range(STEPS):
            logits, kept[0] = steps.decode(model.params, model.config, token, kept[0])
        return logits

    return run


def _collective_task(preset: str, devices: int) -> Any:
    """A function that runs `STEPS` all-reduces, one after the other, of what a step adds up in one of them."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    import llorch_jax as lj

    mesh = lj.make_mesh(model=devices)

    def body(x: jax.Array) -> jax.Array:
        for _ in range(STEPS):
            x = jax.lax.psum(x, "model") / devices
        return x

    spec = PartitionSpec("model")
    added = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    make = jax.jit(
        lambda: jnp.ones((devices, preset_config(preset).n_embd)), out_shardings=NamedSharding(mesh, spec)
    )  # fmt: skip
    x = make()
    return lambda: added(x)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--counts", type=numbers, default=[2, 4], help="numbers of devices")
    options.add_argument("--kinds", type=lambda text: text.split(","), default=["devices", "processes"])
    options.add_argument("--prefix", type=shlex.split, default=[], help="put before the command of child processes")
    options.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    chosen = options.parse_args(argv)
    if chosen.child:
        _child(chosen.preset, chosen.rounds, *chosen.child)
        return
    figures = measure(chosen.preset, chosen.counts, chosen.kinds, chosen.rounds, chosen.prefix)
    show(figures, lambda line: f"one collective {1000 * line['collective_ms']:.0f} us")
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
