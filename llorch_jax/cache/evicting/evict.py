"""Eviction from caches of any layout: `evict`, and the policies that decide what is kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.cache.evicting.cache import SLACK, EvictingCache
from llorch_jax.cache.evicting.policies import (
    AttentionSinks,
    HeavyHitters,
    Policy,
    RecencyWindow,
    SnapKV,
    check_settings,
    votes_asked,
)
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete

__all__ = ["AttentionSinks", "EvictingCache", "HeavyHitters", "Policy", "RecencyWindow", "SnapKV", "evict"]


def evict(
    cache: KVCache, policy: Policy, budget: int, *, votes: tuple[jax.Array, ...] | None = None, slack: int = SLACK
) -> EvictingCache:
    """Reduces a cache to `budget` tokens per row and head. Host only; the input stays valid.

    Args:
        cache: a cache of any layout except a rotating one, which has already dropped tokens by position.
        policy: what to keep; see `policies`.
        budget: number of tokens to keep per row and head, 1 or more; rows that hold no more are unchanged.
        votes: L arrays float32 [B, K, S], the attention that the slots of `cache.read(layer)` have received, for
            policies that ask for it. An `EvictingCache` has collected them already.
        slack: number of tokens between evictions of the result.

    Returns:
        A cache with separate buffers that evicts again whenever it holds `budget + slack` tokens.

    Raises:
        CacheError: a setting is invalid, votes are missing or misshapen, or the policy returned invalid slots.
    """
    check_settings(policy, budget, slack)
    if not is_concrete(cache):
        raise CacheError("evict: expected a cache outside jit, got a traced one")
    if not (isinstance(cache, EvictingCache) or cache.keeps_all(cache.capacity)):
        raise CacheError(f"evict: expected an EvictingCache or one that keeps all tokens, got a {type(cache).__name__}")
    budget = min(budget, cache.capacity)
    whole = _as_evicting(cache, policy, budget, slack, _checked_votes(cache, policy, votes))
    full = np.asarray(whole.held) > budget
    return whole.compacted(full)


def _as_evicting(
    cache: KVCache, policy: Policy, budget: int, slack: int, votes: tuple[jax.Array, ...]
) -> EvictingCache:
    """All tokens of a cache as an EvictingCache with the same slots, to be compacted."""
    settings: dict[str, Any] = {"policy": policy, "budget": budget, "slack": slack, "votes": votes}
    if isinstance(cache, EvictingCache):
        return cache.replace(**settings)
    views = [cache.read(layer) for layer in range(cache.dims[0])]
    stored = [view.slots() for view in views]  # not decoded: encoding again would round again
    batch, heads = cache.batch_size, cache.dims[1]
    slots = views[0].positions.shape[-1]
    return EvictingCache(
        keys=tuple(keys for keys, _ in stored),
        values=tuple(values for _, values in stored),
        origins=tuple(jnp.zeros((batch, heads, slots), jnp.int32) for _ in views),
        lengths=jnp.copy(cache.lengths),  # copied, as the result may be donated
        kept=jnp.zeros_like(cache.lengths),
        seen=jnp.zeros_like(cache.lengths),
        recent=jax.tree.map(jnp.copy, cache.recent),
        codec=cache.codec,
        limit=cache.capacity,
        **settings,
    )


def _checked_votes(cache: KVCache, policy: Policy, votes: tuple[jax.Array, ...] | None) -> tuple[jax.Array, ...]:
    if votes_asked(policy) == 0 and votes is None:
        return ()
    if votes is None and isinstance(cache, EvictingCache):
        votes = cache.votes
    layers, heads, _ = cache.dims
    expected = [[cache.batch_size, heads, cache.read(layer).positions.shape[-1]] for layer in range(layers)]
    got = [list(array.shape) for array in votes or ()]
    if got != expected:
        raise CacheError(
            f"votes: expected an array of shape {expected[0]} for each of {len(expected)} layers, as "
            f"{type(policy).__name__} depends on the attention that tokens receive; got {got or 'none'} (an "
            "EvictingCache with this policy collects them as it is filled)"
        )
    return tuple(jnp.asarray(array, jnp.float32) for array in votes or ())
