"""The cost of weights in low precision: perplexity and KL divergence relative to the float32 weights, by format.

    python -m benchmarks.weights --text FILE [--model demo] [--length 512] [--rows 32] [--random gpt2] [--json F]
                                 [--formats float16,bfloat16,int8,w8a8,int8:32,int4:32,int4:64]

The text is cut into rows of `--length` tokens. `--random PRESET` replaces the model by one with random weights and the
text by random tokens, whose perplexity means nothing, so that only the divergence is shown. KL divergence is that of
the rounded model's distribution from the exact one's, in nats, averaged over tokens.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llorch_jax as lj
from benchmarks.decoder import random_tokens
from benchmarks.measure import machine, random_model, write_json

FORMATS = "float16,bfloat16,int8,w8a8,int8:32,int4:32,int4:64"


@partial(jax.jit, static_argnames="config")
def compared(config: lj.GPT2Config, exact: lj.Params, rounded: lj.Params, row: Any) -> jax.Array:
    """Sums over the predictions of a row of tokens [T]: KL divergence, and the loss of each of the two models."""
    first, second = (jax.nn.log_softmax(lj.forward(params, config, row[None, :-1])[0]) for params in (exact, rounded))
    divergence = jnp.sum(jnp.exp(first) * (first - second))
    losses = [-jnp.sum(jnp.take_along_axis(each, row[1:, None], axis=1)) for each in (first, second)]
    return jnp.stack([divergence, *losses])


def measure(params: lj.Params, config: lj.GPT2Config, tokens: np.ndarray, formats: Sequence[str]) -> dict[str, Any]:
    """For each format its size, divergence and perplexity on rows of tokens [B, T], and the exact perplexity."""
    found: dict[str, Any] = {}
    for name in formats:
        weights, _, group = name.partition(":")
        rounded = lj.quantize(params, weights, int(group) if group else None)
        sums = sum(np.asarray(compared(config, params, rounded, row), np.float64) for row in tokens)
        kl, exact, loss = sums / (tokens.shape[0] * (tokens.shape[1] - 1))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(rounded))
        found[name] = {"bytes": size, "kl": kl, "perplexity": np.exp(loss), "exact_perplexity": np.exp(exact)}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text", type=Path, help="a text that the model was not trained on")
    options.add_argument("--model", default="demo")
    options.add_argument("--random", metavar="PRESET", help="random weights and tokens instead of a model and a text")
    options.add_argument("--formats", type=lambda text: text.split(","), default=FORMATS.split(","))
    options.add_argument("--length", type=int, default=512, help="tokens per row (default: 512)")
    options.add_argument("--rows", type=int, default=32, help="rows of tokens (default: 32)")
    options.add_argument("--json", type=Path, help="file for the figures")
    settings = options.parse_args(argv)
    if (settings.random is None) == (settings.text is None):
        options.error("expected --text or --random")
    if settings.random is not None:
        config, params = random_model(settings.random)
        tokens = np.asarray(random_tokens(config, settings.rows, settings.length))
    else:
        model = lj.load(settings.model)
        config, params = model.config, model.params
        ids = np.asarray(model.tokenizer.encode(settings.text.read_text(encoding="utf-8")), np.int32)
        tokens = ids[: len(ids) // settings.length * settings.length].reshape(-1, settings.length)[: settings.rows]
        if len(tokens) < settings.rows:
            options.error(f"--text: expected {settings.rows} rows of {settings.length} tokens, got {len(ids)} tokens")
    found = measure(params, config, tokens, settings.formats)
    print(f"{'weights':<10}{'MB':>9}{'KL, nats':>12}{'perplexity':>13}")
    for name, each in found.items():
        ratio = "" if settings.random else f"{each['perplexity'] / each['exact_perplexity']:.4f} x"
        print(f"{name:<10}{each['bytes'] / 1e6:>9.1f}{each['kl']:>12.2e}{ratio:>13}")
    if settings.json is not None:
        write_json(settings.json, {"machine": machine(), "weights": found})


if __name__ == "__main__":
    main()
