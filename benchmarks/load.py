"""Time and peak memory of loading a checkpoint.

    python -m benchmarks.load [--preset gpt2-medium] [--weights float32] [--json FILE]

Writes the preset with random weights to a temporary directory and loads it in a fresh process (Linux only: the peak is
VmHWM). Memory is counted in excess of an interpreter that has imported jax.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import llorch_jax as lj
from benchmarks.measure import machine, random_model, write_json
from llorch_jax.params import nbytes
from llorch_jax.quantization import quantized_shapes

CHILD = """
import json, sys, time
import jax
jax.numpy.zeros(1).block_until_ready()
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
import llorch_jax as lj
before, start = peak(), time.perf_counter()
model = lj.load(sys.argv[1], weights=sys.argv[2])
jax.block_until_ready(model.params)
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak() - before}))
"""


def measure(preset: str, weights: str) -> dict[str, Any]:
    """Seconds and peak bytes of loading, and the ratio of the latter to the parameters' bytes."""
    config, params = random_model(preset)
    with tempfile.TemporaryDirectory() as folder:
        lj.save_model(folder, config, params)
        size = nbytes(quantized_shapes(config, weights))
        command = [sys.executable, "-c", CHILD, folder, weights]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(child.stdout)
    return {
        "setting": {"preset": preset, "weights": weights},
        "machine": machine(),
        "parameter_bytes": size,
        "peak_bytes": figures["bytes"],
        "peak_over_parameters": figures["bytes"] / size,
        "seconds": figures["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-medium")
    parser.add_argument("--weights", default="float32", help="format of the weights in memory")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments.preset, arguments.weights)
    peak, size = report["peak_bytes"] / 1e6, report["parameter_bytes"] / 1e6
    print(f"{size:,.0f} MB of parameters loaded in {report['seconds']:.2f} s")
    print(f"peak {peak:,.0f} MB above the interpreter: {report['peak_over_parameters']:.3f} x the parameters")
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
