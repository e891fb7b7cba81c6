"""The log-probabilities of tokens that are known."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from llorch_jax.buckets import bucket
from llorch_jax.cache.placement import new_cache
from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.steps import Alternatives, alternatives, logprobs_of
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


class Scores(NamedTuple):
    """Log-probabilities of some known tokens.

    Attributes:
        logprobs: float32 [T], the natural log-probability of each after those before it.
        top_ids: int32 [T, K], the most likely ids in their places.
        top_logprobs: float32 [T, K], their log-probabilities.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def scores_by_chunks(
    params: Params, config: GPT2Config, ids: Sequence[int], top: int, chunk: int = 64
) -> Iterator[Scores]:
    """`token_logprobs` a chunk at a time, each computed when it is asked for, with alternatives.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        ids: checked token ids [T + 1], T in 0 .. n_positions.
        top: number K of alternatives.
        chunk: maximum number of tokens per chunk.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    known = np.asarray(ids, np.int32)
    count = len(known) - 1
    if count < 1:
        return
    capacity = bucket(count, config.n_positions)
    size = min(chunk, capacity)
    cache = new_cache(params.mesh, StaticCache.init, config, batch_size=1, capacity=capacity)
    padded = np.pad(known, (0, capacity + 1 - len(known)))
    for done in range(0, count, size):
        # The last chunk begins early enough to be whole: some tokens are then computed twice, alike.
        start = min(done, capacity - size)
        part, stop = padded[start : start + size + 1], min(done + size, count)
        found, cache = _score_chunk(params, config, cache, np.array([start], np.int32), part, top)
        logprobs, top_ids, top_logprobs = jax.tree.leaves(found)
        scores = Scores(*(np.asarray(each)[done - start : stop - start] for each in (logprobs, top_ids, top_logprobs)))
        check_finite(scores.logprobs)
        yield scores


def check_finite(logprobs: Any) -> None:
    """Raises NonFiniteError unless log-probabilities of known tokens, or sums of them, are finite; host only."""
    if not np.isfinite(np.asarray(logprobs)).all():
        raise NonFiniteError("logits: expected finite numbers, got NaN or infinity; check the weights")


@partial(jax.jit, static_argnames="config")
def _logprobs(params: Params, config: GPT2Config, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of each target [B, T] after the inputs [B, T] up to its place."""
    return logprobs_of(run(params, config, inputs, None).logits, targets)


@partial(jax.jit, static_argnames=("config", "top"), donate_argnames="cache")
def _score_chunk(
    params: Params, config: GPT2Config, cache: StaticCache, start: jax.Array, part: jax.Array, top: int
) -> tuple[tuple[jax.Array, Alternatives], StaticCache]:
    """Log-probabilities of the tokens part[1:], and alternatives, after the first `start` [1] tokens of a cache.

    The cache then has part[:-1] too.
    """
    out = run(params, config, part[None, :-1], cache.replace(lengths=start))
    logits = out.logits[0]
    return (logprobs_of(logits, part[1:]), alternatives(logits, top)), out.cache
