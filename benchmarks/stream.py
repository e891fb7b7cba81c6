"""The cost of streaming: `stream_tokens` compared with the compiled loop of `generate_tokens`, per token.

    python -m benchmarks.stream [--preset gpt2] [--prompt 64] [--new 64]

The ratio is relative to `generate_tokens` with the same arguments, in the same round. Both are timed from the second
token on: the time for the prompt is measured by generating one token, and subtracted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import llorch_jax as lj
from benchmarks.decoder import random_tokens
from benchmarks.limits import Limits
from benchmarks.measure import interleaved, random_model, seconds
from benchmarks.reports import Report, keep, parser, report, row, show


def measure(preset: str, prompt: int, new: int, rounds: int) -> Report:
    """One row: milliseconds per streamed token."""
    config, params = random_model(preset)
    tokens = random_tokens(config, 1, prompt)

    def per_token(run: Callable[[int], Any]) -> float:
        return 1000 * (seconds(lambda: run(new)) - seconds(lambda: run(1))) / (new - 1)

    values = interleaved(
        {
            **Limits.of(preset).tasks(),
            "loop": lambda: per_token(lambda count: lj.generate_tokens(params, config, tokens, count)),
            "stream": lambda: per_token(lambda count: list(lj.stream_tokens(params, config, tokens, count))),
        },
        rounds,
    )
    line = row("streamed token", values["stream"], values["loop"])
    return report("stream", {"preset": preset, "prompt": prompt, "new": new}, [line], values, "loop")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--new", type=int, default=64)
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, chosen.prompt, chosen.new, chosen.rounds)
    show(figures, lambda row: f"{100 * (row['ratio']['median'] - 1):.1f} % more than the loop")
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
