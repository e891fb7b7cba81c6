"""What searches over branches share: rows of one cache that are fed, compared, and reordered in every step."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.request import Request
from llorch_jax.errors import NonFiniteError, SearchError
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.tracing import is_concrete

Cache = TypeVar("Cache", bound=KVCache)

_LARGEST = float(np.finfo(np.float32).max)


def feed(
    params: Params, config: GPT2Config, token: jax.Array, cache: Cache, count: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Cache]:
    """Feeds one token per row, in `jit`.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        token: int32 [R].
        cache: of R rows, with room reserved.
        count: int32 [R], 0 for rows that are computed but not lengthened; None means 1 for all.

    Returns:
        Logits float32 [R, V], final hidden states float32 [R, D], and the cache.
    """
    count = jnp.ones_like(token) if count is None else count
    out = run(params, config, token[:, None], cache, count, last=True)
    return out.logits, out.hidden[:, 0], out.cache


def span(cache: KVCache) -> int:
    """How many steps may run in `jit` before `reserve` must be called again. Host only.

    Rows that were reordered in `jit` are ready for the next token, except where they share slots: those need slots of
    their own from the host.
    """
    return 1 if cache.shares_slots else cache.room()


def check_untraced(request: Request) -> None:
    """Raises SearchError inside `jit`: the searches run on the host between compiled spans."""
    if not is_concrete(request.tokens, request.lengths, request.cache):
        raise SearchError("search: expected a call outside jit, got traced arrays")


def count_ids(config: GPT2Config, allowed: Any) -> int:
    """The number of ids that a search may choose: of bits int32 [1, ceil(V / 32)], or of the vocabulary where None."""
    if allowed is None:
        return config.vocab_size
    return int(np.bitwise_count(np.asarray(allowed, np.int32).view(np.uint32)).sum())


def check_numbers(values: Any) -> None:
    """Raises NonFiniteError where scores or probabilities are NaN, as those of NaN or infinite logits are."""
    if np.any(np.isnan(np.asarray(values))):
        raise NonFiniteError("logits: expected finite numbers, got NaN or infinity; check the weights")


def check_real(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises SearchError unless a setting is a finite number, in float32 too, in a range."""
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if known and max(least, -_LARGEST) <= value <= min(most, _LARGEST):
        return
    expected = "a finite number"
    if math.isfinite(least):
        expected += f" from {least:g} up" if math.isinf(most) else f" from {least:g} to {most:g}"
    raise SearchError(f"{name}: expected {expected}, got {value!r:.80}")
