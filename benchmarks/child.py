"""Tasks of `startup` and `memory` in a fresh process: `python -m benchmarks.child TASK`, settings as JSON on stdin.

Only the modules that a task needs are imported, and the first token is generated with the public functions.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run_child(task: str, **setting: Any) -> dict[str, Any]:
    """Runs a task in a fresh interpreter; `started` in the result is the time just before the start."""
    command = [sys.executable, "-m", "benchmarks.child", task]
    started = time.time()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        command, input=json.dumps(setting), check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    return {**json.loads(child.stdout.splitlines()[-1]), "started": started}


def bare() -> dict[str, Any]:
    """An interpreter that imports jax and computes one number."""
    import jax

    jax.numpy.zeros(1).block_until_ready()
    return {"first_token": time.time()}


def startup(folder: str, prompt: int, new: int, compilation_cache: str) -> dict[str, Any]:
    """When the first and the last token were available, and the seconds spent on compiling until then."""
    import jax

    import llorch_jax as lj
    from benchmarks.decoder import random_tokens
    from llorch_jax.text.timing import compile_seconds

    jax.config.update("jax_compilation_cache_dir", compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_seconds()
    imported = time.time()
    model = lj.load(folder)
    params = jax.block_until_ready(model.params)
    loaded = time.time()
    config = model.config
    tokens = lj.stream_tokens(params, config, random_tokens(config, 1, prompt), 1)
    next(tokens)
    times = {"imported": imported, "loaded": loaded, "first_token": time.time(), "compile_first": compile_seconds()}
    jax.block_until_ready(lj.generate_tokens(params, config, random_tokens(config, 1, prompt), new))
    return {**times, "last_token": time.time(), "compile_all": compile_seconds()}


def memory(folder: str, layout: str, batch: int, prompt: int, new: int, capacity: int) -> dict[str, Any]:
    """Peak resident bytes in excess of an interpreter with jax: for loading, the first generation, and the next."""
    import jax

    jax.numpy.zeros(1).block_until_ready()
    import llorch_jax as lj
    from benchmarks.decoder import make_cache, random_tokens

    base = peak()
    model = lj.load(folder)
    params = jax.block_until_ready(model.params)
    config = model.config
    peaks = {"load": peak(reset=True) - base}
    cache = make_cache(config, layout, batch, capacity)
    allocated = 0
    for phase in ("first", "next"):  # the first generation compiles
        _, cache = lj.generate_tokens(params, config, random_tokens(config, batch, prompt), new, cache=cache)
        allocated = jax.block_until_ready(cache).memory_usage()
        cache = cache.clear()
        peaks[phase] = peak(reset=True) - base
    return {"peaks": peaks, "cache_bytes": allocated}


def peak(reset: bool = False) -> int:
    """The peak resident size of this process in bytes so far, or since the last reset. Linux only."""
    status = Path("/proc/self/status").read_text().splitlines()
    size = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return size


if __name__ == "__main__":
    print(json.dumps({"bare": bare, "startup": startup, "memory": memory}[sys.argv[1]](**json.load(sys.stdin))))
