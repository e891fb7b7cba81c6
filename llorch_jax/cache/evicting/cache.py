"""EvictingCache: a limited number of tokens per row and head, chosen by a policy."""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.attention import KVView, Queries, attention_mass
from llorch_jax.buckets import bucket
from llorch_jax.cache.axes import array, grow_slots, setting
from llorch_jax.cache.base import KVCache, replace_item
from llorch_jax.cache.codecs import Codec, Stored, make_codec, residual_of
from llorch_jax.cache.evicting.policies import AttentionSinks, Policy, check_settings, remembers, votes_asked
from llorch_jax.cache.fields import check_range, check_whole_numbers
from llorch_jax.cache.recent import Recent
from llorch_jax.cache.room import active_rows, check_sizes, cropped
from llorch_jax.cache.static import empty_slots, slots_of, write_slots
from llorch_jax.cache.views import SlotView
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete, on_host

SLACK = 32


@struct.dataclass(repr=False)
class EvictingCache(KVCache):
    """Keys and values of the tokens that a policy keeps, chosen separately for each head; see `policies`.

    A row accepts tokens until it holds `budget + slack` of them. The next `reserve` then lets the policy choose
    `budget` of them and compacts the row. Rows are evicted independently, so that none depends on its batch. A longer
    prompt is first read in full, in buffers that are temporarily larger. Tokens keep their positions, and the row still
    ends at n_positions.

    Slots are in the order of positions. A row's first `kept` slots were left by its last eviction, when it had seen
    `seen` tokens; the later slots hold the positions from `seen` on.

    Attributes:
        keys: for each of L layers, stored keys [B, K, S, ...].
        values: for each of L layers, stored values.
        origins: L arrays int32 [B, K, S], the position of the token that the last eviction left in a slot.
        votes: L arrays float32 [B, K, S], attention that the tokens have received; empty if the policy asks for none.
        lengths: int32 [B], tokens that each row has seen; the next one gets this position.
        kept: int32 [B], tokens left by the row's last eviction.
        seen: int32 [B], tokens that the row had seen at its last eviction.
        recent, codec: as in `StaticCache`.
        policy: what to keep.
        budget: maximum number of tokens of a row and head after an eviction.
        slack: number of further tokens before the next eviction.
        limit: maximum number of tokens that a row can see, the model's n_positions.
    """

    keys: tuple[Stored, ...] = array("BKS")
    values: tuple[Stored, ...] = array("BKS")
    origins: tuple[jax.Array, ...] = array("BKS")
    votes: tuple[jax.Array, ...] = array("BKS")
    lengths: jax.Array = array("B")
    kept: jax.Array = array("B")
    seen: jax.Array = array("B")
    recent: tuple[Recent, ...] = ()
    codec: Codec = setting(kw_only=True)
    policy: Policy = setting(kw_only=True)
    budget: int = setting(kw_only=True)
    slack: int = setting(kw_only=True)
    limit: int = setting(kw_only=True)

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
        codec: Any = None,
        residual: int | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            budget: number of tokens that an eviction keeps, 1 or more. One above n_positions keeps everything.
            policy: which tokens are kept; `AttentionSinks()` by default. A custom function must be hashable.
            slack: number of tokens between evictions, 1 or more.
            dtype, codec, residual: how keys and values are stored; as in `StaticCache.init`.

        Raises:
            CacheError: the batch size, budget, policy, slack, dtype, codec or residual is invalid.
        """
        policy = AttentionSinks() if policy is None else policy
        check_sizes(config, batch_size, config.n_positions)
        check_settings(policy, budget, slack)
        budget = min(budget, config.n_positions)
        slots = min(budget + slack, config.n_positions)
        layers = config.cache_layers
        shape = (batch_size, config.kv_heads, slots)
        stored_as = make_codec(codec, config.head_dim, dtype)
        window = residual_of(stored_as, residual, slots)
        return cls(
            **empty_slots(config, batch_size, slots, stored_as, window),
            origins=tuple(jnp.zeros(shape, jnp.int32) for _ in range(layers)),
            votes=tuple(jnp.zeros(shape, jnp.float32) for _ in range(layers if votes_asked(policy) != 0 else 0)),
            kept=jnp.zeros(batch_size, jnp.int32),
            seen=jnp.zeros(batch_size, jnp.int32),
            policy=policy,
            budget=budget,
            slack=slack,
            limit=config.n_positions,
        )

    def check_fields(self) -> None:
        super().check_fields()
        check_settings(self.policy, self.budget, self.slack)
        check_whole_numbers(self, {"limit": self.budget})
        check_range("seen", self.seen, 0, self.lengths)
        check_range("kept", self.kept, 0, np.minimum(self.seen, self.slots))
        check_range("held", self.held, 0, self.slots)
        if len(self.votes) != (len(self.keys) if votes_asked(self.policy) != 0 else 0):
            raise CacheError(f"votes: expected those that {self.policy!r:.40} asks for, got {len(self.votes)} layers")
        filled = np.arange(self.slots) < np.asarray(self.kept)[:, None, None]
        most = np.asarray(self.seen)[:, None, None] - 1
        for layer, origins in enumerate(self.origins):
            known = np.where(filled, np.asarray(origins), 0)
            check_range(f"origins[{layer}]", known, 0, np.where(filled, most, 0))
            if (np.diff(known, axis=-1) <= 0)[filled[..., 1:] & np.ones_like(known[..., 1:], bool)].any():
                raise CacheError(f"origins[{layer}]: expected ascending positions, got others")

    @property
    def capacity(self) -> int:
        return self.limit

    @property
    def slots(self) -> int:
        """Number of allocated slots per row S; more than `budget + slack` while it holds a long prompt."""
        return slots_of(self)

    @property
    def held(self) -> jax.Array:
        """int32 [B], number of tokens that each head of a row holds."""
        return self.kept + self.lengths - self.seen

    @property
    def full_slots(self) -> int:
        """Number of tokens that a row may hold before an eviction."""
        return min(self.budget + self.slack, self.limit)

    def can_roll_back(self, count: Any) -> bool:
        """As `KVCache.can_roll_back`: False if tokens would be evicted, or if queries vote."""
        return not self.votes and bool(np.all(np.asarray(self.held) + np.asarray(count) <= self.full_slots))

    def keeps_all(self, tokens: int) -> bool:
        return tokens <= self.full_slots

    def _slots_for_tokens(self) -> int:
        return self.slots

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        cache = write_slots(self, layer, k, v, self.held)
        queries = votes_asked(self.policy)
        if not queries or k.shape[1] < queries:
            return cache
        # Only the newest queries vote, and here all of them are in this append: earlier votes no longer count.
        outvoted = (self._counts(k, count) >= queries)[:, None, None]
        return cache.replace(votes=replace_item(self.votes, layer, jnp.where(outvoted, 0, self.votes[layer])))

    def read(self, layer: int) -> SlotView:
        slot = jnp.arange(self.slots, dtype=jnp.int32)[None, None]
        later = slot + (self.seen - self.kept)[:, None, None]
        positions = jnp.where(slot < self.kept[:, None, None], self.origins[layer], later)
        return SlotView(self.keys[layer], self.values[layer], positions, self._exact(layer), codec=self.codec)

    def held_positions(self) -> jax.Array:
        first = self.read(0).positions
        same = jnp.ones(first.shape[::2], bool)
        for layer in range(len(self.keys)):
            same &= jnp.all(self.read(layer).positions == first[:, :1], axis=1)
        return jnp.where(same, first[:, 0], -1)

    def observe(self, layer: int, q: jax.Array, view: KVView, queries: Queries, scale: float) -> Self:
        """Adds the attention that slots receive from the voting queries; see `policies`."""
        asked = votes_asked(self.policy)
        if asked == 0:
            return self
        new = q.shape[1]
        voting = new if asked is None else min(asked, new)
        ends = self._counts(q, queries.count)[:, None]
        voters = ends - 1 - jnp.arange(voting, dtype=jnp.int32)[None]  # the newest ones, int32 [B, voting]
        mass = attention_mass(q, view.dense(), queries, scale, voters)
        # The view of a first append shows only the tokens of that append, which are in the first slots.
        votes = self.votes[layer]
        mass = jnp.pad(mass, ((0, 0), (0, 0), (0, max(0, self.slots - mass.shape[2]))))[..., : self.slots]
        return self.replace(votes=replace_item(self.votes, layer, votes + mass))

    def reserve(self, count: Any, *, lengths: Any = None, pinned: Any = ()) -> Self:
        """The cache with room for `count` (int or int32 [B]) more tokens per row, after evictions where necessary.

        Call it on the host; in `jit` it does nothing. The numbers of tokens held are read from the device.

        Raises:
            CapacityError: a row would be longer than the limit.
            CacheError: a row was cropped to a length whose tokens have been evicted, or the policy returned invalid
                slots.
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
        if not is_concrete(self.lengths):
            return self.slots
        longest = int(np.max(active_rows(self.lengths, active)))
        fullest = int(np.max(active_rows(self.held, active)))
        return max(0, min(self.limit - longest, min(self.full_slots, self.slots) - fullest))

    def crop(self, length: Any) -> Self:
        """As `KVCache.crop`, but no further back than the row's last eviction, or to an empty row.

        Votes of the rolled-back queries for the remaining tokens stay counted.

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

    def insert(self, slots: Any, source: Self) -> Self:
        """As `KVCache.insert`; outside `jit` the buffers grow to the source's size first."""
        return KVCache.insert(self._with_slots(source.slots), slots, source)

    def join(self, others: Sequence[Self]) -> Self:
        """As `KVCache.join`; buffers that a long prompt has enlarged may differ in size."""
        slots = max(cache.slots for cache in (self, *others))
        return KVCache.join(self._with_slots(slots), [cache._with_slots(slots) for cache in others])

    def allocation(self) -> Hashable:
        """As `KVCache.allocation`; the current size of the buffers does not matter."""
        return jax.tree.structure(self), self.batch_size, self.dims, self.residual

    def _check_intact(self, lengths: Any) -> None:
        if not is_concrete(lengths, self.seen):
            return
        known = np.asarray(lengths)
        seen = np.asarray(self.seen)
        lost = (known > 0) & (known < seen)
        if lost.any():
            row = int(np.argmax(lost))
            raise CacheError(
                f"cache: row {row} cannot continue from {known[row]} tokens, as earlier ones were evicted when it had "
                f"{seen[row]}; expected {seen[row]} or more, or 0"
            )

    def compacted(self, full: np.ndarray) -> Self:
        """The cache with `budget` tokens in the rows of `full` bool [B], and no more slots than a row uses. Host only.

        Raises:
            CacheError: the policy returned invalid slots.
        """
        chosen = _choose(self)
        if full.any():
            _check_chosen(on_host(chosen), np.asarray(self.held)[full], full)
        return _compact(self, chosen, jnp.asarray(full), min(self.full_slots, self.slots))

    def _with_slots(self, slots: int) -> Self:
        """The cache with at least `slots` slots per row."""
        return grow_slots(self, slots)


@jax.jit
def _choose(cache: EvictingCache) -> jax.Array:
    """What the policy keeps, int32 [L, B, K, budget]."""
    slot = jnp.arange(cache.slots, dtype=jnp.int32)[None, None]
    filled = slot < cache.held[:, None, None]
    chosen = []
    for layer, origins in enumerate(cache.origins):
        positions = jnp.where(filled, cache.read(layer).positions, -1)
        votes = cache.votes[layer] if cache.votes else jnp.zeros(origins.shape, jnp.float32)
        chosen.append(cache.policy(votes, positions, cache.lengths, min(cache.budget, cache.slots)))
    return jnp.stack(chosen)


@partial(jax.jit, static_argnames="slots")
def _compact(cache: EvictingCache, chosen: jax.Array, full: jax.Array, slots: int) -> EvictingCache:
    """The cache with `slots` slots, and in the rows `full` bool [B] only the tokens of the chosen slots."""
    chosen = jnp.sort(chosen, axis=-1)[..., :slots]
    chosen = jnp.pad(chosen, [(0, 0)] * 3 + [(0, slots - chosen.shape[-1])])
    unchanged = jnp.arange(slots, dtype=jnp.int32)[None, None, None]
    chosen = jnp.where(full[None, :, None, None], chosen, unchanged)  # [L, B, K, S']

    def taken(layers: tuple[Any, ...]) -> tuple[Any, ...]:
        """The chosen slots of each layer's arrays [B, K, S, ...]; empty for an empty tuple."""

        def take(index: jax.Array, array: jax.Array) -> jax.Array:
            return jnp.take_along_axis(array, index if array.ndim == 3 else index[..., None], axis=2)

        return tuple(
            jax.tree.map(partial(take, index), arrays) for arrays, index in zip(layers, chosen, strict=bool(layers))
        )

    positions = tuple(cache.read(layer).positions for layer in range(len(cache.keys)))
    kept = jnp.where(full, jnp.minimum(cache.held, cache.budget), cache.kept)
    forgets = not remembers(cache.policy)
    left = full[:, None, None] & ((jnp.arange(slots)[None, None] >= kept[:, None, None]) | forgets)
    return cache.replace(
        keys=taken(cache.keys),
        values=taken(cache.values),
        origins=taken(positions),
        votes=tuple(jnp.where(left, 0, votes) for votes in taken(cache.votes)),
        kept=kept,
        seen=jnp.where(full, cache.lengths, cache.seen),
    )


def _check_chosen(chosen: np.ndarray, held: np.ndarray, full: np.ndarray) -> None:
    """Raises CacheError unless each row of `full` [B] keeps distinct slots that hold a token."""
    rows = np.sort(chosen[:, full], axis=-1)  # [L, B', K, budget]
    if chosen.dtype.kind != "i" or (rows[..., 1:] == rows[..., :-1]).any() or rows.min() < 0:
        raise CacheError(f"policy: expected distinct slots, int32, got {rows.tolist()!s:.200}")
    if (rows[..., -1] >= held[:, None]).any():
        raise CacheError(f"policy: expected slots below the {held.tolist()} tokens held, got {rows.tolist()!s:.200}")
