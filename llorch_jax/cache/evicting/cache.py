"""EvictingCache: at most a budget of tokens per row and head, chosen by a policy."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.attention import KVView
from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache, active_rows, check_rows, check_sizes, cropped, join_rows, replace_item
from llorch_jax.cache.codecs.floats import dtype_of, from_stored
from llorch_jax.cache.evicting.policies import AttentionSinks, Policy, check_settings, votes_asked
from llorch_jax.cache.static import empty_slots, write_rows
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete

SLACK = 32


@struct.dataclass
class EvictingCache(KVCache):
    """Keys and values of the tokens that a policy keeps, each head its own; see `policies`.

    A row takes up new tokens until it has `budget + slack` of them. The next `reserve` then lets the policy choose
    `budget` of them and compacts the row; rows are judged one by one, so that none depends on its batch. A prompt that
    is longer is read in full first, in buffers that are larger for that time. Tokens keep their positions, and the row
    still ends at n_positions.

    Slots are in the order of positions. A row's first `kept` slots were left by its last eviction, when it had seen
    `seen` tokens; the later ones hold the positions from `seen` on.

    Attributes:
        keys: L arrays [B, K, S, H].
        values: L arrays [B, K, S, H].
        origins: L arrays int32 [B, K, S], the position of what an eviction left in a slot.
        votes: L arrays float32 [B, K, S], attention that the tokens have received; none where the policy asks for none.
        lengths: int32 [B], tokens that each row has seen; the next one gets this position.
        kept: int32 [B].
        seen: int32 [B].
        policy: what to keep.
        budget: tokens that a row and head has after an eviction, at most.
        slack: how many more it may have before the next one.
        limit: tokens that a row can ever see, the model's n_positions.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    origins: tuple[jax.Array, ...]
    votes: tuple[jax.Array, ...]
    lengths: jax.Array
    kept: jax.Array
    seen: jax.Array
    policy: Policy = struct.field(pytree_node=False)
    budget: int = struct.field(pytree_node=False)
    slack: int = struct.field(pytree_node=False)
    limit: int = struct.field(pytree_node=False)

    @classmethod
    def init(
        cls,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        budget: int,
        policy: Policy | None = None,
        slack: int = SLACK,
        dtype: Any = "float32",
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            budget: tokens that an eviction leaves, 1 or more. One that reaches past n_positions keeps everything.
            policy: what it leaves; `AttentionSinks()` by default. A function of your own must be hashable.
            slack: tokens from one eviction to the next, 1 or more.
            dtype: of keys and values as stored: float32, bfloat16 or float16. Attention computes in float32.

        Raises:
            CacheError: the batch size, budget, policy, slack or dtype is impossible.
        """
        policy = AttentionSinks() if policy is None else policy
        check_sizes(config, batch_size, config.n_positions)
        check_settings(policy, budget, slack)
        budget = min(budget, config.n_positions)
        slots, layers = min(budget + slack, config.n_positions), config.cache_layers
        shape = (batch_size, config.kv_heads, slots)
        return cls(
            **empty_slots(config, batch_size, slots, dtype),
            origins=tuple(jnp.zeros(shape, jnp.int32) for _ in range(layers)),
            votes=tuple(jnp.zeros(shape, jnp.float32) for _ in range(layers if votes_asked(policy) != 0 else 0)),
            kept=jnp.zeros(batch_size, jnp.int32),
            seen=jnp.zeros(batch_size, jnp.int32),
            policy=policy,
            budget=budget,
            slack=slack,
            limit=config.n_positions,
        )

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.limit

    @property
    def slots(self) -> int:
        """Slots per row S that are allocated; more than `budget + slack` while a long prompt is in."""
        return self.keys[0].shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values: float32, bfloat16 or float16."""
        return dtype_of(self.keys[0])

    @property
    def layout(self) -> tuple[int, int, int]:
        _, heads, _, head_dim = self.keys[0].shape
        return len(self.keys), heads, head_dim

    @property
    def held(self) -> jax.Array:
        """int32 [B], how many tokens each head of a row holds."""
        return self.kept + self.lengths - self.seen

    @property
    def slots_in_jit(self) -> int:
        return self.slots

    @property
    def full_slots(self) -> int:
        """How many tokens a row may hold before an eviction."""
        return min(self.budget + self.slack, self.limit)

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        votes, queries = self.votes, votes_asked(self.policy)
        if queries and k.shape[1] >= queries:  # only the newest vote, so those before have no longer a say
            new = jnp.broadcast_to(jnp.asarray(k.shape[1] if count is None else count, jnp.int32), self.lengths.shape)
            votes = replace_item(votes, layer, jnp.where((new >= queries)[:, None, None], 0, votes[layer]))
        return self.replace(
            votes=votes,
            keys=replace_item(self.keys, layer, write_rows(self.keys[layer], k, self.held)),
            values=replace_item(self.values, layer, write_rows(self.values[layer], v, self.held)),
        )

    def read(self, layer: int) -> KVView:
        slot = jnp.arange(self.slots, dtype=jnp.int32)[None, None]
        later = slot + (self.seen - self.kept)[:, None, None]
        positions = jnp.where(slot < self.kept[:, None, None], self.origins[layer], later)
        return KVView(from_stored(self.keys[layer]), from_stored(self.values[layer]), positions)

    def held_positions(self) -> jax.Array:
        first = self.read(0).positions
        same = jnp.ones(first.shape[::2], bool)
        for layer in range(len(self.keys)):
            same &= jnp.all(self.read(layer).positions == first[:, :1], axis=1)
        return jnp.where(same, first[:, 0], -1)

    def voters(self, new: int, count: Any) -> jax.Array | None:
        queries = votes_asked(self.policy)
        if queries == 0:
            return None
        ends = jnp.broadcast_to(jnp.asarray(new if count is None else count, jnp.int32), self.lengths.shape)
        voting = new if queries is None else min(queries, new)
        return ends[:, None] - 1 - jnp.arange(voting, dtype=jnp.int32)[None]

    def observe(self, layer: int, mass: jax.Array) -> Self:
        return self.replace(votes=replace_item(self.votes, layer, self.votes[layer] + mass))

    def reserve(self, count: Any) -> Self:
        """The cache with room for `count` (int or int32 [B]) more tokens per row, after evicting what must go.

        Call it on the host; in `jit` it does nothing.

        Raises:
            CapacityError: a row would be longer than the limit.
            CacheError: the row was cropped to where tokens are missing, or the policy chose wrongly.
        """
        self.check_room(count)
        if not is_concrete(self, count):
            return self
        self._check_intact(self.lengths)
        held = np.asarray(self.held)
        full = (held + np.asarray(count) > self.full_slots) & (held > self.budget)
        cache = self.compacted(full) if full.any() else self
        needed = int(np.max(np.where(full, self.budget, held) + np.asarray(count)))
        return cache._with_slots(bucket(needed, self.limit)) if needed > cache.slots else cache

    def room(self, active: Any = None) -> int:
        longest = int(np.max(active_rows(self.lengths, active)))
        fullest = int(np.max(active_rows(self.held, active)))
        return max(0, min(self.limit - longest, min(self.full_slots, self.slots) - fullest))

    def can_roll_back(self, count: Any) -> bool:
        """As `KVCache.can_roll_back`: not where tokens would be evicted, or where queries vote."""
        return not self.votes and bool(np.all(np.asarray(self.held) + np.asarray(count) <= self.full_slots))

    def advance(self, count: Any) -> Self:
        self.check_room(count)
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def crop(self, length: Any) -> Self:
        """As `KVCache.crop`: back to where a row was at its last eviction, or to nothing.

        Votes that the rolled-back queries gave to the tokens left stay counted.

        Raises:
            CacheError: tokens that the shorter row needs have been evicted. In `jit` this cannot be known: the next
                `reserve` raises it.
        """
        lengths = cropped(self.lengths, length)
        self._check_intact(lengths)
        used = lengths > 0
        cache = self.replace(lengths=lengths, kept=jnp.where(used, self.kept, 0), seen=jnp.where(used, self.seen, 0))
        left = jnp.arange(self.slots, dtype=jnp.int32)[None] < cache.held[:, None]
        return cache.replace(votes=tuple(jnp.where(left[:, None], votes, 0) for votes in self.votes))

    def select(self, rows: Any) -> Self:
        index = check_rows(rows, self.batch_size)
        return jax.tree.map(lambda array: jnp.take(array, index, axis=0), self)

    def join(self, others: Sequence[Self]) -> Self:
        """As `KVCache.join`; what a long prompt has enlarged may differ."""
        caches = (self, *others)
        slots = max(cache.slots for cache in caches)
        return join_rows([cache._with_slots(slots) for cache in caches])

    def allocation(self) -> Hashable:
        """As `KVCache.allocation`; the present size of the buffers does not matter."""
        return jax.tree.structure(self), self.batch_size, self.layout, self.keys[0].dtype.name

    def _check_intact(self, lengths: Any) -> None:
        if not is_concrete(lengths, self.seen):
            return
        known, seen = np.asarray(lengths), np.asarray(self.seen)
        lost = (known > 0) & (known < seen)
        if lost.any():
            row = int(np.argmax(lost))
            raise CacheError(
                f"cache: row {row} cannot go on from {known[row]} tokens, as tokens before were evicted when it had "
                f"{seen[row]}; expected {seen[row]} or more, or 0"
            )

    def compacted(self, full: np.ndarray) -> Self:
        """The cache with `budget` tokens in the rows of `full` bool [B], in as many slots as a row may use. Host only.

        Raises:
            CacheError: the policy chose wrongly.
        """
        chosen = _choose(self)
        if full.any():
            _check_chosen(np.asarray(chosen), np.asarray(self.held)[full], full)
        return _compact(self, chosen, jnp.asarray(full), min(self.full_slots, self.slots))

    def _with_slots(self, slots: int) -> Self:
        """The cache with at least so many slots per row."""

        def grown(array: jax.Array) -> jax.Array:
            more = [(0, 0)] * array.ndim
            more[2] = (0, max(0, slots - array.shape[2]))
            return jnp.pad(array, more)

        fields = ("keys", "values", "origins", "votes")
        return self.replace(**{name: tuple(grown(array) for array in getattr(self, name)) for name in fields})


@jax.jit
def _choose(cache: EvictingCache) -> jax.Array:
    """What the policy keeps, int32 [L, B, K, budget]."""
    slot = jnp.arange(cache.slots, dtype=jnp.int32)[None, None]
    filled, chosen = slot < cache.held[:, None, None], []
    for layer, keys in enumerate(cache.keys):
        positions = jnp.where(filled, cache.read(layer).positions, -1)
        votes = cache.votes[layer] if cache.votes else jnp.zeros(keys.shape[:3], jnp.float32)
        chosen.append(cache.policy(votes, positions, cache.lengths, min(cache.budget, cache.slots)))
    return jnp.stack(chosen)


@partial(jax.jit, static_argnames="slots")
def _compact(cache: EvictingCache, chosen: jax.Array, full: jax.Array, slots: int) -> EvictingCache:
    """The cache with `slots` slots, and in the rows `full` bool [B] only the tokens of the chosen slots."""
    chosen = jnp.sort(chosen, axis=-1)[..., :slots]
    chosen = jnp.pad(chosen, [(0, 0)] * 3 + [(0, slots - chosen.shape[-1])])
    unchanged = jnp.arange(slots, dtype=jnp.int32)[None, None, None]
    chosen = jnp.where(full[None, :, None, None], chosen, unchanged)  # [L, B, K, S']

    def taken(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(
            jnp.take_along_axis(array, index if array.ndim == 3 else index[..., None], axis=2)
            for array, index in zip(arrays, chosen, strict=bool(arrays))
        )

    positions = tuple(cache.read(layer).positions for layer in range(len(cache.keys)))
    kept = jnp.where(full, jnp.minimum(cache.held, cache.budget), cache.kept)
    remembers = getattr(cache.policy, "remembers", False)
    left = full[:, None, None] & ((jnp.arange(slots)[None, None] >= kept[:, None, None]) | (not remembers))
    return cache.replace(
        keys=taken(cache.keys),
        values=taken(cache.values),
        origins=taken(positions),
        votes=tuple(jnp.where(left, 0, votes) for votes in taken(cache.votes)),
        kept=kept,
        seen=jnp.where(full, cache.lengths, cache.seen),
    )


def _check_chosen(chosen: np.ndarray, held: np.ndarray, full: np.ndarray) -> None:
    """Raises CacheError unless each row of `full` [B] keeps different slots that hold a token."""
    rows = np.sort(chosen[:, full], axis=-1)  # [L, B', K, budget]
    if chosen.dtype.kind != "i" or (rows[..., 1:] == rows[..., :-1]).any() or rows.min() < 0:
        raise CacheError(f"policy: expected different slots, int32, got {rows.tolist()!s:.200}")
    if (rows[..., -1] >= held[:, None]).any():
        raise CacheError(f"policy: expected slots below the {held.tolist()} tokens held, got {rows.tolist()!s:.200}")
