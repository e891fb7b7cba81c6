"""Eviction policies: pure functions that say which tokens a cache keeps when it has too many.

A policy is called as `policy(votes, positions, lengths, budget)` for one layer and returns the slots to keep:

    votes: float32 [B, K, S], the attention that each slot has received, or zeros where the policy asks for none.
    positions: int32 [B, K, S], of the token in each slot; negative where a slot is empty.
    lengths: int32 [B], tokens that each row has seen.
    budget: how many tokens each row may keep per head, at most S.
    returns: int32 [B, K, budget], different slots in any order; where a row holds more than `budget` tokens all of
        them must hold one, else the empty ones are left out.

A function of your own needs nothing else. Two attributes say what votes it wants: `queries`, how many of the newest
of each append vote (0, the default, for none; None for all), and `remembers`, whether votes outlast an eviction.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from llorch_jax.errors import CacheError
from llorch_jax.tracing import whole


class Policy(Protocol):
    """What `EvictingCache` and `evict` call; the module says with what."""

    def __call__(self, votes: jax.Array, positions: jax.Array, lengths: jax.Array, budget: int) -> jax.Array:
        """The slots to keep, int32 [B, K, budget]."""
        ...


def keep_best(priority: jax.Array, positions: jax.Array, budget: int) -> jax.Array:
    """The slots int32 [B, K, budget] of the tokens of highest priority, float32 [B, K, S]; the first of equals."""
    return lax.top_k(jnp.where(positions >= 0, priority, -jnp.inf), budget)[1].astype(jnp.int32)


def newest(positions: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    """Which slots hold one of a row's `count` newest tokens: bool [B, K, S]."""
    return positions >= lengths[:, None, None] - count


@dataclasses.dataclass(frozen=True)
class RecencyWindow:
    """Keeps the newest tokens."""

    queries: ClassVar[int | None] = 0
    remembers: ClassVar[bool] = False

    def __call__(self, votes: jax.Array, positions: jax.Array, lengths: jax.Array, budget: int) -> jax.Array:
        return keep_best(positions.astype(jnp.float32), positions, budget)


@dataclasses.dataclass(frozen=True)
class AttentionSinks:
    """Keeps the first tokens of a row, which gather attention that heads have no use for, and the newest ones.

    StreamingLLM (Xiao et al. 2023, 2309.17453, section 3.2), but that tokens keep their positions: GPT-2's are learned
    and part of the keys.

    Attributes:
        sinks: how many first tokens; they are part of the budget.
    """

    sinks: int = 4
    queries: ClassVar[int | None] = 0
    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole("sinks", self.sinks, CacheError, least=0)

    def __call__(self, votes: jax.Array, positions: jax.Array, lengths: jax.Array, budget: int) -> jax.Array:
        priority = jnp.where(positions < self.sinks, jnp.inf, positions.astype(jnp.float32))
        return keep_best(priority, positions, budget)


@dataclasses.dataclass(frozen=True)
class HeavyHitters:
    """Keeps the newest tokens and those that have received most attention so far, for each head.

    H2O (Zhang et al. 2023, 2306.14048, section 4): attention is summed over all queries since a token came in.

    Attributes:
        recent: share of the budget for the newest tokens, 0 .. 1.
    """

    recent: float = 0.5
    queries: ClassVar[int | None] = None
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.recent, int | float) or not 0 <= self.recent <= 1:
            raise CacheError(f"recent: expected a share of the budget, 0 .. 1, got {self.recent!r:.80}")

    def __call__(self, votes: jax.Array, positions: jax.Array, lengths: jax.Array, budget: int) -> jax.Array:
        recent = newest(positions, lengths, round(self.recent * budget))
        return keep_best(jnp.where(recent, jnp.inf, votes), positions, budget)


@dataclasses.dataclass(frozen=True)
class SnapKV:
    """Keeps the newest tokens and those that they look at most, with their neighbours, for each head.

    Li et al. 2024, 2404.14469, section 4: the last `observation` queries vote, votes are pooled over neighbouring
    positions, and the winners stay. A long prompt is compressed once, after it was read in full. In generation the
    queries since the last eviction vote on the next one.

    Attributes:
        observation: how many of the newest queries vote. Their tokens stay, as far as half of the budget goes.
        kernel: width of the pooling (by the maximum, as in the authors' code), an odd number of slots.
    """

    observation: int = 32
    kernel: int = 7
    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole("observation", self.observation, CacheError)
        whole("kernel", self.kernel, CacheError)
        if self.kernel % 2 == 0:
            raise CacheError(f"kernel: expected an odd number, got {self.kernel}")

    @property
    def queries(self) -> int | None:
        """How many of the newest queries of an append vote."""
        return self.observation

    def __call__(self, votes: jax.Array, positions: jax.Array, lengths: jax.Array, budget: int) -> jax.Array:
        window = (1, 1, self.kernel)
        pooled = lax.reduce_window(votes, -jnp.inf, lax.max, window, (1, 1, 1), "SAME")
        recent = newest(positions, lengths, min(self.observation, max(1, budget // 2)))
        return keep_best(jnp.where(recent, jnp.inf, pooled), positions, budget)


def votes_asked(policy: Policy) -> int | None:
    """How many of the newest queries of an append vote; None for all."""
    return getattr(policy, "queries", 0)


def remembers(policy: Policy) -> bool:
    """Whether votes outlast an eviction."""
    return bool(getattr(policy, "remembers", False))


def check_settings(policy: Any, budget: Any, slack: Any) -> None:
    """Raises CacheError for what cannot be a policy, a budget or a slack."""
    if not callable(policy) or isinstance(policy, type):
        raise CacheError(
            f"policy: expected a function (votes, positions, lengths, budget) -> slots, got {policy!r:.80}"
        )
    whole("budget", budget, CacheError)
    whole("slack", slack, CacheError)
