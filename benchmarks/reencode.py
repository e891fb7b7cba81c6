"""A text far longer than the context: time per token between re-encodings, their cost, and memory.

    python -m benchmarks.reencode [--model demo] [--tokens 10000] [--sinks 4] [--window 256] [--json FILE] [--plot FILE]

When the context is full, the first `--sinks` and the newest `--window` tokens are encoded again. A segment is the text
generated between two re-encodings; its first token waits for the prefill.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import llorch_jax as lj
from benchmarks.measure import Sample, machine, write_json
from llorch_jax.decoding.request import prepare
from llorch_jax.decoding.streaming import stream_steps


def measure(model: lj.Model, tokens: int, reencode: lj.Reencode) -> dict[str, Any]:
    """Milliseconds of every token, by segment, and the process's memory at the start and end of each."""
    prompt = np.array([model.tokenizer.encode("Once upon a time there was a")], np.int32)
    cache = lj.StaticCache.init(model.config)
    sampler = lj.Sampling.create(temperature=0.8, top_k=50)
    run(model, prompt, 2 * model.config.n_positions, cache, sampler, reencode)  # compiles
    segments, memory = run(model, prompt, tokens, lj.StaticCache.init(model.config), sampler, reencode)
    inner = [statistics.mean(times[1:]) for times in segments if len(times) > 10]  # tokens arrive in blocks
    firsts = [times[0] for times in segments[1:]]
    total = sum(sum(times) for times in segments)
    return {
        "setting": {"model": model.name, "tokens": tokens, "sinks": reencode.sinks, "window": reencode.window},
        "machine": machine(),
        "reencodings": len(firsts),
        "reencoding_ms": Sample.of(firsts),
        "share_of_time": (sum(firsts) - len(firsts) * statistics.median(inner)) / total,
        "ms_per_token": total / tokens,
        "segment_ms": inner,
        "memory_mb": memory,
    }


def run(
    model: lj.Model, prompt: np.ndarray, tokens: int, cache: lj.KVCache, sampler: lj.Sampling, reencode: lj.Reencode
) -> tuple[list[list[float]], list[float]]:
    """Milliseconds of each token, by segment, and resident memory in MB at the end of each segment."""
    key = jax.random.key(0)
    request = prepare(model.config, prompt, tokens, cache, None, sampler, key, None, reencode)
    segments: list[list[float]] = [[]]
    memory = []
    start = time.perf_counter()
    for step in stream_steps(model.params, model.config, request):
        if step.part == len(segments):
            memory.append(resident_mb())
            segments.append([])
        segments[-1].append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
    return segments, [*memory, resident_mb()]


def resident_mb() -> float:
    """The process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def plot(report: dict[str, Any], path: Path) -> None:
    """Plots mean time per token and memory, by segment."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    time_axes.plot(report["segment_ms"], marker="o")
    time_axes.set(xlabel="segment between re-encodings", ylabel="ms per token, mean", ylim=(0, None))
    memory_axes.plot(report["memory_mb"], marker="o")
    memory_axes.set(xlabel="segment between re-encodings", ylabel="resident memory, MB", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(arguments)
    report = measure(lj.load(given.model), given.tokens, lj.Reencode(given.sinks, given.window))
    inner = report["segment_ms"]
    print(f"{given.tokens:,} tokens, {report['reencodings']} re-encodings; {report['ms_per_token']:.2f} ms per token")
    print(f"first token after a re-encoding: {report['reencoding_ms']} ms; {report['share_of_time']:.1%} of all time")
    ends = f"first {inner[0]:.2f}, last {inner[-1]:.2f}, min {min(inner):.2f}, max {max(inner):.2f}"
    print(f"ms per token within a segment, means: {ends}")
    first, last = report["memory_mb"][0], report["memory_mb"][-1]
    print(f"resident memory: {first:.0f} MB after the first segment, {last:.0f} MB after the last")
    write_json(given.json, report)
    if given.plot:
        plot(report, given.plot)


if __name__ == "__main__":
    main()
