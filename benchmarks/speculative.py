"""When speculative decoding by prompt lookup pays off: time per token relative to plain decoding, and acceptance.

    python -m benchmarks.speculative [--model demo | --preset gpt2] [--tokens 64] [--rounds 3]

The cases are a text that repeats itself, one that does not, and draws at a high temperature, where hardly any guess is
right. With a preset the weights are random, and only the cost of a step is meaningful. Plain and speculative runs,
prefill included, take turns. "step cost" is the time of a verification step divided by that of a plain step.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np

import llorch_jax as lj
from benchmarks.measure import random_model

REPEATING = (
    "Tom has a red ball. Sue has a red ball. Tom has a red hat. Sue has a red hat. Tom has a blue cup. Sue has a"
)
PLAIN = "Once upon a time there was a little girl who lived in a house near the woods. One day her mother said"


def cases(model: lj.Model | None, vocab_size: int) -> dict[str, tuple[list[int], dict[str, Any]]]:
    """The prompt and settings of each case."""
    hot = {"sampler": lj.Sampling.create(1.5), "key": jax.random.key(0)}
    if model is None or model.tokenizer is None:
        ids = np.random.default_rng(0).integers(0, vocab_size, 32).tolist()
        return {"greedy": (ids, {}), "temperature 1.5": (ids, hot)}
    repeating = model.tokenizer.encode(REPEATING)
    plain = model.tokenizer.encode(PLAIN)
    return {"repeating text": (repeating, {}), "story": (plain, {}), "story, temperature 1.5": (plain, hot)}


def measure(params: lj.Params, config: lj.GPT2Config, ids: list[int], tokens: int, rounds: int, **settings: Any) -> str:
    """One line: milliseconds per token of both, their ratio, acceptance, tokens per step, and cost of a step."""

    def plain() -> Any:
        return lj.generate_tokens(params, config, [ids], tokens, **settings)[0]

    def speculative() -> Any:
        return lj.speculate_tokens(params, config, [ids], tokens, **settings)

    same = np.array_equal(plain(), speculative()[0])  # compiles, too
    times: dict[Any, list[float]] = {plain: [], speculative: []}
    for _ in range(rounds):
        for run, found in times.items():
            start = time.perf_counter()
            out = jax.block_until_ready(run())
            found.append(1000 * (time.perf_counter() - start) / tokens)
    ratio = statistics.median(a / b for a, b in zip(times[plain], times[speculative], strict=True))
    stats = out[2]
    return (
        f"{statistics.median(times[plain]):.2f} | {statistics.median(times[speculative]):.2f} | {ratio:.2f} | "
        f"{stats.acceptance_rate:.0%} | {stats.tokens_per_step:.2f} | "
        f"{stats.tokens_per_step / ratio:.2f} | {'yes' if same else 'no'}"
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--preset")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = None if given.preset else lj.load(given.model)
    config, params = random_model(given.preset) if model is None else (model.config, model.params)
    print("case | plain ms/token | lookup ms/token | speed-up | accepted | tokens per step | step cost | same tokens")
    for name, (ids, settings) in cases(model, config.vocab_size).items():
        print(f"{name} | {measure(params, config, ids, given.tokens, given.rounds, **settings)}", flush=True)


if __name__ == "__main__":
    main()
