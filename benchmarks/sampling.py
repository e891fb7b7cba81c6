"""The cost of choosing a token: transforms of logits and draws, compared with a decode step.

    python -m benchmarks.sampling [--preset gpt2] [--batch 1] [--history 512]

Each sampler is compiled separately and called on random logits for the preset's vocabulary, after a text of `--history`
tokens for those that look at it. The ratio is relative to a step of the compiled greedy loop in the same round.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import llorch_jax as lj
from benchmarks.decoder import Decoder, random_tokens
from benchmarks.limits import Limits
from benchmarks.measure import interleaved, random_model, seconds
from benchmarks.reports import Report, keep, parser, report, row, show
from llorch_jax.sampling import History, make_sampler

CALLS = 8  # per measurement
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "typical_p 0.9": {"typical_p": 0.9},
    "epsilon_cutoff": {"epsilon_cutoff": 3e-4},
    "eta_cutoff": {"eta_cutoff": 3e-4},
    "top_n_sigma 1": {"top_n_sigma": 1.0},
    "xtc": {"xtc_probability": 0.5},
    "mirostat": {"mirostat_tau": 5.0},
    "logit_bias": {"logit_bias": {11: -1.0}},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "frequency, presence": {"frequency_penalty": 0.1, "presence_penalty": 0.1},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "dry": {"dry_multiplier": 0.8},
    "repetition, top_k, top_p": {"repetition_penalty": 1.1, "top_k": 50, "top_p": 0.9},
    "repetition, dry, top_k, min_p": {"repetition_penalty": 1.1, "dry_multiplier": 0.8, "top_k": 50, "min_p": 0.05},
}


def measure(preset: str, batch: int, history: int, rounds: int) -> Report:
    """One row per sampler."""
    config, params = random_model(preset)
    cache = lj.StaticCache.init(config, batch_size=batch, capacity=min(64, config.n_positions))
    decoder = Decoder(params, config, cache, 16, 16)
    tokens = jnp.asarray(random_tokens(config, batch, history))
    past = History.of(tokens, jnp.full(batch, history, jnp.int32), history + 1)
    logits = 3 * jax.random.normal(jax.random.key(1), (batch, config.vocab_size))
    samplers = {name: make_sampler(**{"temperature": 0.8, **given}) for name, given in SETTINGS.items()}
    tasks = {name: call(sampler, logits, past) for name, sampler in samplers.items()}
    values = interleaved({**Limits.of(preset).tasks(), "step": decoder.step_ms, **tasks}, rounds)
    rows = [row(name, values[name], values["step"]) for name in samplers]
    setting = {"preset": preset, "batch": batch, "history": history}
    return report("sampling", setting, rows, values, "step")


def call(sampler: Any, logits: jax.Array, past: History) -> Callable[[], float]:
    """Milliseconds of a call."""
    batch = logits.shape[0]
    keys, no_ids = jax.random.split(jax.random.key(0), batch), jnp.zeros((batch, 0), jnp.int32)

    @jax.jit
    def choose(sampler: Any, logits: jax.Array) -> jax.Array:
        history = past if sampler.needs_history else None
        return sampler.sample(logits, keys, history, no_ids, sampler.init(batch))[0]

    return lambda: 1000 * seconds(lambda: [choose(sampler, logits) for _ in range(CALLS)]) / CALLS


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--history", type=int, default=512, help="tokens that penalties look at")
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, chosen.batch, chosen.history, chosen.rounds)
    show(figures, lambda row: f"{100 * row['ratio']['median']:.1f} % of a step")
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
