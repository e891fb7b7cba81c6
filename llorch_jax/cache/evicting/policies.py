"""Eviction policies: pure functions that decide which tokens a cache keeps when it has too many.

A policy is called as `policy(votes, positions, lengths, budget)` for one layer and returns the slots to keep:

    votes: float32 [B, K, S], the attention that each slot has received, or zeros if the policy asks for none.
    positions: int32 [B, K, S], position of the token in each slot; negative if the slot is empty.
    lengths: int32 [B], number of tokens that each row has seen.
    budget: number of tokens that each row may keep per head, at most S.
    returns: int32 [B, K, budget], distinct slots in any order. If a row holds more than `budget` tokens, all of its
        slots must hold one; otherwise empty ones are ignored.

A custom function needs nothing else. Two optional attributes say which votes it needs: `queries`, how many of the
newest queries of each append vote (0, the default, for none; None for all), and `remembers`, whether votes are kept
after an eviction.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from llorch_jax.errors import CacheError
from llorch_jax.tracing import whole


class Policy(Protocol):
    """The function that `EvictingCache` and `evict` call; the module's docstring describes its arguments."""

    def __call__(self, votes: jax.Array, positions: jax.Array, lengths: jax.Array, budget: int) -> jax.Array:
        """The slots to keep, int32 [B, K, budget]."""
        ...


def keep_best(priority: jax.Array, positions: jax.Array, budget: int) -> jax.Array:
    """The slots int32 [B, K, budget] of the tokens of highest priority, float32 [B, K, S]; ties go to the first."""
    return lax.top_k(jnp.where(positions >= 0, priority, -jnp.inf), budget)[1].astype(jnp.int32)


def newest(positions: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    """Whether each slot holds one of the row's `count` newest tokens: bool [B, K, S]."""
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
    """Keeps the first tokens of a row, which absorb attention that heads have no use for, and the newest ones.

    StreamingLLM (Xiao et al. 2023, 2309.17453, section 3.2), except that tokens keep their positions: GPT-2's are
    learned and part of the keys.

    Attributes:
        sinks: number of first tokens; they count towards the budget.
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
    """Keeps the newest tokens and those that have received the most attention so far, for each head.

    H2O (Zhang et al. 2023, 2306.14048, section 4): attention is summed over all queries since a token was added.

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
    """Keeps the newest tokens and those that they attend to most, with their neighbours, for each head.

    Li et al. 2024, 2404.14469, section 4: the last `observation` queries vote, votes are pooled over neighbouring
    positions, and the tokens with the most votes are kept. A long prompt is compressed once, after it has been read in
    full. In generation the queries since the last eviction vote on the next one.

    Attributes:
        observation: number of newest queries that vote. Their tokens are kept, up to half of the budget.
        kernel: width of the max-pooling (as in the authors' code), an odd number of slots.
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
    """Number of newest queries of an append that vote; None for all."""
    return getattr(policy, "queries", 0)


def remembers(policy: Policy) -> bool:
    """Whether votes are kept after an eviction."""
    return bool(getattr(policy, "remembers", False))


def check_settings(policy: Any, budget: Any, slack: Any) -> None:
    """Raises CacheError for an invalid policy, budget or slack."""
    if not callable(policy) or isinstance(policy, type):
        raise CacheError(
            f"policy: expected a function (votes, positions, lengths, budget) -> slots, got {policy!r:.80}"
        )
    whole("budget", budget, CacheError)
    whole("slack", slack, CacheError)
