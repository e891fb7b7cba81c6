"""The cost of a constraint: the mask of allowed tokens, and a constrained step compared with a plain one.

    python -m benchmarks.constrained [--model demo | --preset gpt2] [--tokens 64] [--rounds 5]

"mask" is the host's time for the mask of one token, measured over the tokens of one text without a model. "plain" is
`generate` in its compiled loop and "constrained" the same with a constraint, both with one row at temperature 1,
without the prefill, and taking turns; the ratio is the median over the rounds. With a preset the weights are random and
the vocabulary is GPT-2's.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

import llorch_jax as lj
from benchmarks.measure import random_model
from llorch_jax.text.constrained.matching import compiler_of

PROMPT = "Once upon a time there was a little girl who lived in a house near the woods."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", "frog"]}, "minItems": 1},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
CASES = {
    "JSON schema": lj.Constraint.json_schema({"type": "array", "items": PERSON, "minItems": 1000}),
    "regex": lj.Constraint.regex(r"[A-Z][a-z]+( [a-z]+,?){1000}\."),
}


def mask_times(model: lj.Model, constraint: lj.Constraint, ids: list[int]) -> list[float]:
    """Milliseconds for the mask before each of some tokens, all of which the constraint allows."""
    compiler = compiler_of(model.tokenizer, model.config.vocab_size, ())
    matcher = compiler.matcher(constraint, ())
    found = []
    for token in ids:
        mask = np.empty((1, compiler.words), np.int32)
        start = time.perf_counter()
        matcher.fill(mask, 0)
        found.append(1000 * (time.perf_counter() - start))
        matcher.push(token)
    return found


def measure(model: lj.Model, constraint: lj.Constraint, tokens: int, rounds: int) -> str:
    """One line: median, 95th percentile and maximum for the mask; milliseconds per token of both, and their ratio."""

    def run(**settings: Any) -> lj.Generation:
        return lj.generate(model, PROMPT, tokens, temperature=1.0, seed=1, **settings)

    run()  # compiles
    masks = mask_times(model, constraint, run(constraint=constraint).token_ids)
    times: dict[str, list[float]] = {"plain": [], "constrained": []}
    for _ in range(rounds):
        times["plain"].append(run().timings.ms_per_token)
        times["constrained"].append(run(constraint=constraint).timings.ms_per_token)
    ratio = statistics.median(b / a for a, b in zip(times["plain"], times["constrained"], strict=True))
    mask = f"{statistics.median(masks):.3f} | {float(np.percentile(masks, 95)):.3f} | {max(masks):.3f}"
    plain, constrained = map(statistics.median, times.values())
    return f"{mask} | {plain:.2f} | {constrained:.2f} | {ratio:.3f}"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--preset")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.preset:
        config, params = random_model(given.preset)
        model = lj.Model(config, params, lj.Tokenizer.gpt2(), given.preset)
    else:
        model = lj.load(given.model)
    print("constraint | mask ms: median | 95 % | max | plain ms/token | constrained ms/token | ratio")
    for name, constraint in CASES.items():
        print(f"{name} | {measure(model, constraint, given.tokens, given.rounds)}", flush=True)


if __name__ == "__main__":
    main()
