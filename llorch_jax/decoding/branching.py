"""What searches over branches share: rows of one cache that are fed, compared, and reordered in every step."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.request import Request
from llorch_jax.errors import CapacityError, SearchError
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.tracing import is_concrete

Cache = TypeVar("Cache", bound=KVCache)


def feed(
    params: Params, config: GPT2Config, token: jax.Array, cache: Cache, count: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Cache]:
    """Feeds one token per row, in `jit`.

    Args:
        params: of a model of this configuration.
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


def check_new_tokens(count: object) -> None:
    """Raises CapacityError unless `count` is a whole number from 1 up."""
    if type(count) is not int or count < 1:
        raise CapacityError(f"max_new_tokens: expected a whole number from 1 up, got {count!r}")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raises SearchError unless a setting is a whole number from `least` up."""
    if type(value) is not int or value < least:
        raise SearchError(f"{name}: expected a whole number from {least} up, got {value!r}")
