"""Prefill and decode speed of a preset with random weights.

    python -m benchmarks.decode [--preset gpt2] [--batch 1] [--prompt 64] [--new 64] [--capacity N] [--json FILE]

A decode step reads every weight but the position embeddings, and the keys and values of the live tokens, at least
once: its floor is those bytes over the bandwidth measured in the same run. A prefill's floor is its floating point
operations over the speed of a large matrix product.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

import llorch_jax as lj
from benchmarks.measure import Sample, gemm_peak, machine, random_model, read_bandwidth, timed, write_json
from llorch_jax.params import nbytes


def measure(preset: str, batch: int, prompt: int, new: int, capacity: int | None, repeats: int) -> dict[str, Any]:
    """All figures of one setting, in milliseconds."""
    config, params = random_model(preset)
    capacity = capacity or prompt + new
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, prompt), np.int32)

    def run(count: int) -> jax.Array:
        cache = lj.StaticCache.init(config, batch_size=batch, capacity=capacity)
        return lj.generate_tokens(params, config, tokens, count, cache=cache)[0]

    limits = {"bandwidth_gb_s": read_bandwidth(), "gemm_gflop_s": gemm_peak()}
    prefill = timed(lambda: run(1), repeats)
    whole = timed(lambda: run(new), repeats)
    step = Sample(*((getattr(whole, key) - prefill.median) / (new - 1) for key in ("median", "low", "high")))
    per_token = 2 * 4 * config.cache_layers * config.kv_heads * config.head_dim  # bytes of keys and values
    read = nbytes(params) - params.wpe.nbytes + batch * (prompt + new // 2) * per_token
    flops = prefill_flops(config, batch, prompt)
    floors = {"step": read / limits["bandwidth_gb_s"] / 1e6, "prefill": flops / limits["gemm_gflop_s"] / 1e6}
    return {
        "setting": {"preset": preset, "batch": batch, "prompt": prompt, "new": new, "capacity": capacity},
        "machine": machine(),
        "limits": limits,
        "prefill_ms": prefill,
        "prefill_share_of_peak": floors["prefill"] / prefill.median,
        "step_ms": step,
        "step_floor_ms": floors["step"],
        "step_over_floor": step.median / floors["step"],
        "tokens_per_second": 1000 * batch / step.median,
    }


def prefill_flops(config: lj.GPT2Config, batch: int, count: int) -> float:
    """Floating point operations of a prefill with logits of the last position only."""
    width, kv_width = config.n_embd, config.kv_heads * config.head_dim
    dense = width * (2 * width + 2 * kv_width + 2 * config.inner_dim)
    attention = 2 * width * (count + 1) / 2
    return 2.0 * batch * (count * config.n_layer * (dense + attention) + width * config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.new < 2:
        parser.error("--new: expected 2 or more, since the first token comes from the prefill")
    settings = (arguments.preset, arguments.batch, arguments.prompt, arguments.new, arguments.capacity)
    report = measure(*settings, arguments.repeats)
    limits = report["limits"]
    print(f"machine  {limits['bandwidth_gb_s']:.1f} GB/s read, {limits['gemm_gflop_s']:.0f} GFLOP/s")
    print(f"prefill  {report['prefill_ms']} ms, {report['prefill_share_of_peak']:.2f} of peak")
    print(f"decode   {report['step_ms']} ms/step, {report['step_over_floor']:.2f} x floor")
    print(f"         {report['tokens_per_second']:.1f} tokens/s")
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
