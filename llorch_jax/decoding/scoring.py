"""The log-probabilities of tokens that are known."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.buckets import bucket
from llorch_jax.config import GPT2Config
from llorch_jax.errors import NonFiniteError
from llorch_jax.model import run
from llorch_jax.params import Params


def token_logprobs(params: Params, config: GPT2Config, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Natural log-probability of each token after those before it, in one pass that is padded to a bucket.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        ids: checked token ids [T + 1], T in 1 .. n_positions; the last one needs no position.

    Returns:
        float32 [T], of ids[1:].

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    known = np.asarray(ids, np.int32)
    count = len(known) - 1
    padding = (0, bucket(count, config.n_positions) - count)
    inputs = np.pad(known[:-1], padding)[None]
    targets = np.pad(known[1:], padding)[None]
    found = np.asarray(_logprobs(params, config, inputs, targets))[0, :count]
    check_finite(found)
    return found


def check_finite(logprobs: Any) -> None:
    """Raises NonFiniteError unless log-probabilities of known tokens, or sums of them, are finite; host only."""
    if not np.isfinite(np.asarray(logprobs)).all():
        raise NonFiniteError("logits: expected finite numbers, got NaN or infinity; check the weights")


@partial(jax.jit, static_argnames="config")
def _logprobs(params: Params, config: GPT2Config, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of each target [B, T] after the inputs [B, T] up to its place."""
    logits = run(params, config, inputs, None).logits
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
