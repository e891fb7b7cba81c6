"""What every KV cache has in common: the protocol that the model and the decoding loops know."""

import abc
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.attention import DenseView, KVView, Queries
from llorch_jax.cache import axes
from llorch_jax.cache.alike import check_alike, check_fits_into, check_same_sizes, describe
from llorch_jax.cache.codecs import Codec, Quantized, Stored, codec_of
from llorch_jax.cache.fields import check_arrays, check_range
from llorch_jax.cache.recent import Recent
from llorch_jax.cache.room import active_rows, check_new_tokens, check_room, check_rows, cropped
from llorch_jax.cache.views import Exact, StoredView
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete, whole

Cache = TypeVar("Cache", bound="KVCache")


class KVCache(abc.ABC):
    """An immutable KV cache: every operation returns a new cache and leaves this one as it was.

    Rows are independent sequences. Row b holds `lengths[b]` tokens; the next token of the row gets position
    `lengths[b]`. A forward pass calls `reserve` once on the host, then, in `jit`, `append` once per layer that owns
    keys and values, and then `advance` once.

    Concrete caches are `struct.dataclass` classes with a factory `init(config, *, batch_size, ...)`, whose fields name
    the axes of their arrays (`axes.array`). Outside `jit` an operation copies the arrays it changes. Inside a jitted
    function that donates the cache, as `decode_step` does, the same operations write in place.

    A `layer` here is the number of a cache layer, 0 .. config.cache_layers - 1. It is the number of the block unless
    blocks share keys and values (`GPT2Config.kv_sharing`).

    Attributes:
        keys: L times stored keys, as `codec` stores them.
        values: L times stored values.
        recent: L times the newest tokens in float32, where a lossy codec was given a float window; else empty.
        lengths: int32 [B], tokens in each row.
        codec: how vectors are stored.
    """

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    recent: tuple[Recent, ...]
    lengths: jax.Array
    codec: Codec
    shares_slots: ClassVar[bool] = False  # whether rows that `select` repeats need `reserve` before they write

    if TYPE_CHECKING:  # struct.dataclass adds it to the concrete classes

        def replace(self, **changes: Any) -> Self: ...

    @classmethod
    def upgraded(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a saved cache; files of earlier versions do not name the codec."""
        known = dict(fields)
        head_dim = known.pop("head_dim", None)
        keys = known.get("keys")
        if "codec" in known or not isinstance(keys, tuple) or not keys:
            return known  # of this version, or damaged
        stored = keys[0]
        if isinstance(stored, jax.Array | Quantized):
            known["codec"] = codec_of(stored, head_dim if isinstance(head_dim, int) else None)
        optional = [field for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING]  # type: ignore[arg-type]
        return {**{field.name: field.default for field in optional}, **known}

    def check_fields(self) -> None:
        """Raises CacheError unless the fields fit each other, as those of a cache from a file must. Host only.

        No operation makes such a cache. Layouts with fields of their own check these too.
        """
        check_arrays(self)
        check_range("lengths", self.lengths, 0, self.capacity)

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.lengths.shape[0]

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """The largest number of tokens that a row can ever hold."""

    @property
    def dims(self) -> tuple[int, int, int]:
        """Number of cache layers, kv heads K and head_dim H."""
        first = jax.tree.leaves(self.keys[0])[0]
        return len(self.keys), first.shape[1], self.codec.head_dim

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values when they are read: float32, bfloat16 or float16."""
        return self.codec.dtype

    @property
    def residual(self) -> int:
        """How many of the newest tokens of a row are kept in float32 in addition."""
        return self.recent[0].positions.shape[1] if self.recent else 0

    def keeps_all(self, tokens: int) -> bool:
        """Whether a row of so many tokens has lost none of them, so that `crop` can go back to any length."""
        return True

    def update(self, layer: int, k: jax.Array, v: jax.Array, count: Any = None) -> Self:
        """Writes T new tokens of one layer after each row's end; `advance` makes them part of the row.

        Args:
            layer: which cache layer.
            k: keys [B, T, K, H].
            v: values [B, T, K, H].
            count: int32 [B], how many of each row's T tokens are real, the others being padding after them; None
                means all.

        Raises:
            CacheError: layer or shapes do not fit.
            CapacityError: a row has no room for the tokens (checked outside `jit` only).
        """
        check_new_tokens(layer, k, v, self.batch_size, self.dims, count)
        return self.reserve(k.shape[1] if count is None else count)._append(layer, k, v, count)

    def append(
        self, layer: int, k: jax.Array, v: jax.Array, count: Any = None, *, fresh: bool = False
    ) -> tuple[Self, KVView]:
        """`update` without checks, and what the queries of these T tokens may look at.

        They see the tokens of this append exactly where the codec says so (`Codec.exact_append`) or where there is a
        float window, and otherwise as they are stored.

        Args:
            layer: which cache layer.
            k: keys [B, T, K, H].
            v: values [B, T, K, H].
            count: int32 [B], how many of each row's T tokens are real; None means all.
            fresh: whether the cache is known to be empty: then these tokens are all that there is to see.
        """
        # Written before it is read: XLA would copy the buffers otherwise.
        with jax.named_scope("cache_update"):
            cache = self._append(layer, k, v, count)
        if fresh:
            return cache, self._own_view(k, v)
        return cache, self._view_after(cache, layer, k, v, count)

    def _append(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        """`update` without its checks."""
        cache = self._write(layer, k, v, count)
        if not self.recent:
            return cache
        recent = self.recent[layer].written(k, v, self.lengths, self._counts(k, count))
        return cache.replace(recent=replace_item(self.recent, layer, recent))

    @abc.abstractmethod
    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        """Encodes the tokens into the layout's slots."""

    def _counts(self, k: jax.Array, count: Any) -> jax.Array:
        """How many of each row's tokens k [B, T, K, H] are real, int32 [B]."""
        return jnp.broadcast_to(jnp.asarray(k.shape[1] if count is None else count, jnp.int32), self.lengths.shape)

    @property
    def _sees_own_exactly(self) -> bool:
        return self.codec.exact_append or self.residual > 0

    def _own(self, x: jax.Array) -> jax.Array:
        """New tokens [B, T, K, H] as the queries of their append see them, [B, K, T, H]."""
        seen = x if self._sees_own_exactly else self.codec.decode(self.codec.encode(x))
        return seen.transpose(0, 2, 1, 3)

    def _own_view(self, k: jax.Array, v: jax.Array) -> DenseView:
        """What the queries of the first append see: its own tokens, in order."""
        return DenseView(self._own(k), self._own(v), jnp.arange(k.shape[1], dtype=jnp.int32)[None])

    def _view_after(self, cache: Self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> KVView:
        """What the queries of an append see; `cache` is this one with the tokens written."""
        view = cache.read(layer)
        if not self._sees_own_exactly or k.shape[1] <= self.residual:  # stored as they are seen, or in the float window
            return view
        steps = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        real = steps < self._counts(k, count)[:, None]
        positions = jnp.where(real, self.lengths[:, None] + steps, -1)
        own = Exact(self._own(k), self._own(v), positions, self.lengths)
        return view.replace(exact=(*view.exact, own))

    @abc.abstractmethod
    def read(self, layer: int) -> StoredView:
        """Everything that one layer holds, tokens just written by `update` included."""

    def _exact(self, layer: int) -> tuple[Exact, ...]:
        """The float window of a layer, as views want it."""
        if not self.recent:
            return ()
        recent = self.recent[layer]
        return (Exact(recent.keys, recent.values, recent.positions),)

    def advance(self, count: Any) -> Self:
        """Lengthens every row by `count` tokens, an int or int32 [B], that `update` has written in all layers."""
        self.check_room(count)
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def observe(self, layer: int, q: jax.Array, view: KVView, queries: Queries, scale: float) -> Self:
        """Takes note of where the queries of an append look; only layouts that evict by attention do.

        Args:
            layer: which cache layer.
            q: [B, T, N, H].
            view: what `append` returned with this cache.
            queries: their positions.
            scale: of the scores.
        """
        return self

    def held_positions(self) -> jax.Array:
        """int32 [B, S] or [1, S], the position that each slot holds in all layers and heads; negative where none."""
        return self.read(0).positions

    def check_room(self, count: Any, *, lengths: Any = None) -> None:
        """Raises CapacityError where a row can never have room for `count` (int or int32 [B]) more tokens.

        `lengths` are the rows' lengths where the host knows them, so that they need not be read from the device.
        """
        check_room(self.lengths if lengths is None else lengths, count, self.capacity)

    def reserve(self, count: Any, *, lengths: Any = None, pinned: Any = ()) -> Self:
        """A cache that can be given `count` (int or int32 [B]) more tokens per row in `jit`. Call it on the host.

        Layouts that allocate as they grow do so here; the others only check.

        Args:
            count: how many.
            lengths: of the rows, int [B], where the host knows them: nothing is read back from the device then.
            pinned: pages that must not be allocated although no row names them; of paged layouts only.

        Raises:
            CapacityError: there is no room for them.
        """
        self.check_room(count, lengths=lengths)
        return self

    def room(self, active: Any = None) -> int:
        """How many tokens the rows can be given in `jit` before `reserve` must be called again.

        In `jit`, where lengths are not known, as many as empty rows can be given without allocating.

        Args:
            active: bool [B], the rows that will be given tokens, one at least; None means all.
        """
        longest = int(np.max(active_rows(self.lengths, active))) if is_concrete(self.lengths) else 0
        return self._slots_for_tokens() - longest

    def _slots_for_tokens(self) -> int:
        """How many tokens an empty row can be given without allocating."""
        return self.capacity

    def can_roll_back(self, count: Any) -> bool:
        """Whether `crop` can undo appending `count` (int or int32 [B]) tokens without a trace. Host only.

        Speculative decoding takes rejected guesses back this way.
        """
        return True

    def is_empty(self) -> bool:
        """Whether it is known that no row holds a token; never in `jit`."""
        return is_concrete(self.lengths) and not np.any(np.asarray(self.lengths))

    def clear(self) -> Self:
        """The same cache with no token in it."""
        return self.crop(0)

    def crop(self, length: Any) -> Self:
        """Rolls back to the first `length` tokens, an int or int32 [B]; shorter rows stay as they are."""
        return self.replace(lengths=cropped(self.lengths, length))

    def free(self, rows: Any) -> Self:
        """The cache with these rows, int [R], empty; what only they held can be used by others."""
        index = check_rows(rows, self.batch_size)
        kept = jnp.full(self.batch_size, self.capacity, jnp.int32)
        return self.crop(kept.at[index].set(0))

    def insert(self, slots: Any, source: Self) -> Self:
        """The cache with the rows of `source` in place of its own rows `slots`.

        In a jitted function that donates this cache the rows are written in place.

        Args:
            slots: int [R], different row numbers of this cache.
            source: a cache of R rows of the same layout and settings; its buffers may be smaller.

        Raises:
            CacheError: the caches do not fit, or a row number is out of range or named twice.
        """
        index = check_rows(slots, self.batch_size)
        if is_concrete(index) and len(set(np.asarray(index).tolist())) < index.shape[0]:
            raise CacheError(f"slots: expected different rows, got {np.asarray(index).tolist()}")
        if source.batch_size != index.shape[0]:
            raise CacheError(f"source: expected {index.shape[0]} rows, one per slot, got {source.batch_size}")
        self._check_alike("insert", source)
        check_fits_into(self, source)
        return axes.insert_rows(self, index, source)

    def select(self, rows: Any) -> Self:
        """A cache whose rows are the given rows of this one, int [B']; rows may repeat, move or be left out."""
        return axes.select_rows(self, check_rows(rows, self.batch_size))

    def fork(self, branches: int) -> Self:
        """Every row `branches` times, one after the other: row b becomes rows b * branches .. (b + 1) * branches - 1.

        Raises:
            CacheError: branches is not a whole number from 1 up.
        """
        times = whole("branches", branches, CacheError)
        return self.select(np.repeat(np.arange(self.batch_size), times))

    def join(self, others: Sequence[Self]) -> Self:
        """This cache's rows and after them those of the others, which are of the same class; see `concat`.

        Raises:
            CacheError: sizes or settings differ.
        """
        for number, other in enumerate(others, 1):
            self._check_alike(f"concat: caches[{number}]", other)
            check_same_sizes(self, other, number)
        return axes.join_rows((self, *others))

    def _check_alike(self, what: str, other: "KVCache") -> None:
        """Raises CacheError unless another cache has the class, settings and model dimensions of this one."""
        check_alike(what, self, other)

    def allocation(self) -> Hashable:
        """What must be equal in two caches for one to do in place of the other once it is cleared."""
        leaves, structure = jax.tree.flatten(self)
        return structure, self.batch_size, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves if leaf.ndim >= 3)

    def memory_usage(self) -> int:
        """Bytes of all arrays of the cache, exactly."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        return f"{describe(self)}, with {self.batch_size} rows of up to {self.capacity} tokens"


def replace_item(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    """The tuple with one item replaced."""
    return (*items[:index], item, *items[index + 1 :])
