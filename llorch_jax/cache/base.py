"""The protocol of all KV caches, which is all that the model and the decoding loops rely on."""

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
    """An immutable KV cache: every operation returns a new cache and leaves this one unchanged.

    Rows are independent sequences. Row b holds `lengths[b]` tokens; its next token gets position `lengths[b]`. A
    forward pass calls `reserve` once on the host, then, in `jit`, `append` once for each layer that owns keys and
    values, and then `advance` once.

    Concrete caches are `struct.dataclass` classes with a factory `init(config, *, batch_size, ...)`, whose fields name
    the axes of their arrays (`axes.array`). Outside `jit` an operation copies the arrays it changes. Inside a jitted
    function that donates the cache, as `decode_step` does, the same operations write in place.

    A `layer` is the index of a cache layer, 0 .. config.cache_layers - 1. It is the index of the block unless blocks
    share keys and values (`GPT2Config.kv_sharing`).

    Attributes:
        keys: for each of L layers, the keys as `codec` stores them.
        values: for each of L layers, the values as `codec` stores them.
        recent: for each of L layers, the newest tokens in float32; empty unless a lossy codec has a float window.
        lengths: int32 [B], number of tokens in each row.
        codec: how vectors are stored.
    """

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    recent: tuple[Recent, ...]
    lengths: jax.Array
    codec: Codec
    shares_slots: ClassVar[bool] = False  # whether rows that `select` has repeated need `reserve` before they write

    if TYPE_CHECKING:  # added to the concrete classes by struct.dataclass

        def replace(self, **changes: Any) -> Self: ...

    @classmethod
    def upgraded(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a saved cache, completed where an earlier version did not save the codec."""
        known = dict(fields)
        head_dim = known.pop("head_dim", None)
        keys = known.get("keys")
        if "codec" in known or not isinstance(keys, tuple) or not keys:
            return known  # of this version, or invalid
        stored = keys[0]
        if isinstance(stored, jax.Array | Quantized):
            known["codec"] = codec_of(stored, head_dim if isinstance(head_dim, int) else None)
        optional = [field for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING]  # type: ignore[arg-type]
        return {**{field.name: field.default for field in optional}, **known}

    def check_fields(self) -> None:
        """Raises CacheError unless the fields are consistent, as in a cache from a file they may not be. Host only.

        No operation makes an inconsistent cache. Layouts check their additional fields too.
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
        """Maximum number of tokens that a row can hold."""

    @property
    def dims(self) -> tuple[int, int, int]:
        """Number of cache layers, kv heads K and head_dim H."""
        first = jax.tree.leaves(self.keys[0])[0]
        return len(self.keys), first.shape[1], self.codec.head_dim

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of keys and values when they are read: float32, bfloat16 or float16."""
        return self.codec.dtype

    @property
    def residual(self) -> int:
        """Number of newest tokens per row that are also kept in float32."""
        return self.recent[0].positions.shape[1] if self.recent else 0

    def keeps_all(self, tokens: int) -> bool:
        """Whether a row of this many tokens still holds all of them, so that `crop` can roll back to any length."""
        return True

    def update(self, layer: int, k: jax.Array, v: jax.Array, count: Any = None) -> Self:
        """Writes T new tokens of one layer after each row's end; `advance` makes them part of the row.

        Args:
            layer: index of the cache layer.
            k: keys [B, T, K, H].
            v: values [B, T, K, H].
            count: int32 [B], how many of each row's T tokens are real; the rest, after them, is padding. None means
                all.

        Raises:
            CacheError: the layer does not exist or a shape is wrong.
            CapacityError: a row has no room for the tokens (checked outside `jit` only).
        """
        check_new_tokens(layer, k, v, self.batch_size, self.dims, count)
        return self.reserve(k.shape[1] if count is None else count)._append(layer, k, v, count)

    def append(
        self, layer: int, k: jax.Array, v: jax.Array, count: Any = None, *, fresh: bool = False
    ) -> tuple[Self, KVView]:
        """`update` without checks, and a view of what the queries of these T tokens may attend to.

        If the codec says so (`Codec.exact_append`) or there is a float window, the queries see the tokens of this
        append exactly; otherwise they see them as stored.

        Args:
            layer: index of the cache layer.
            k: keys [B, T, K, H].
            v: values [B, T, K, H].
            count: int32 [B], how many of each row's T tokens are real; None means all.
            fresh: whether the cache is known to be empty, so that the view holds only these tokens.
        """
        # Write before reading: XLA would copy the buffers otherwise.
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
        """New tokens [B, T, K, H] as the queries of the same append see them, [B, K, T, H]."""
        seen = x if self._sees_own_exactly else self.codec.decode(self.codec.encode(x))
        return seen.transpose(0, 2, 1, 3)

    def _own_view(self, k: jax.Array, v: jax.Array) -> DenseView:
        """What the queries of the first append see: the tokens of that append, in order."""
        return DenseView(self._own(k), self._own(v), jnp.arange(k.shape[1], dtype=jnp.int32)[None])

    def _view_after(self, cache: Self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> KVView:
        """What the queries of an append see; `cache` is this one with the tokens written."""
        view = cache.read(layer)
        if not self._sees_own_exactly or k.shape[1] <= self.residual:  # seen as stored, or in the float window
            return view
        steps = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        real = steps < self._counts(k, count)[:, None]
        positions = jnp.where(real, self.lengths[:, None] + steps, -1)
        own = Exact(self._own(k), self._own(v), positions, self.lengths)
        return view.replace(exact=(*view.exact, own))

    @abc.abstractmethod
    def read(self, layer: int) -> StoredView:
        """Everything that one layer holds, including tokens just written by `update`."""

    def _exact(self, layer: int) -> tuple[Exact, ...]:
        """The float window of a layer, in the form that views take."""
        if not self.recent:
            return ()
        recent = self.recent[layer]
        return (Exact(recent.keys, recent.values, recent.positions),)

    def advance(self, count: Any) -> Self:
        """Lengthens every row by `count` tokens, int or int32 [B], which `update` has written in all layers."""
        self.check_room(count)
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def observe(self, layer: int, q: jax.Array, view: KVView, queries: Queries, scale: float) -> Self:
        """Records what the queries of an append attend to; does nothing unless the layout evicts by attention.

        Args:
            layer: index of the cache layer.
            q: queries [B, T, N, H].
            view: what `append` returned with this cache.
            queries: the positions of the queries.
            scale: factor of the attention scores.
        """
        return self

    def held_positions(self) -> jax.Array:
        """int32 [B, S] or [1, S], the position that each slot holds in all layers and heads; negative if empty."""
        return self.read(0).positions

    def check_room(self, count: Any, *, lengths: Any = None) -> None:
        """Raises CapacityError if a row can never have room for `count` (int or int32 [B]) more tokens.

        `lengths` are the rows' lengths if the host knows them; then they need not be read from the device.
        """
        check_room(self.lengths if lengths is None else lengths, count, self.capacity)

    def reserve(self, count: Any, *, lengths: Any = None, pinned: Any = ()) -> Self:
        """A cache with room for `count` (int or int32 [B]) more tokens per row in `jit`. Call it on the host.

        Layouts that grow allocate here; the others only check.

        Args:
            count: number of tokens.
            lengths: lengths of the rows, int [B], if the host knows them; nothing is read back from the device then.
            pinned: pages that must not be allocated, although no row names them; for paged layouts only.

        Raises:
            CapacityError: there is no room for the tokens.
        """
        self.check_room(count, lengths=lengths)
        return self

    def room(self, active: Any = None) -> int:
        """How many tokens the rows have room for in `jit` before `reserve` must be called again.

        In `jit`, where lengths are not known: how many tokens empty rows have room for without allocating.

        Args:
            active: bool [B], the rows that will receive tokens, at least one; None means all.
        """
        longest = int(np.max(active_rows(self.lengths, active))) if is_concrete(self.lengths) else 0
        return self._slots_for_tokens() - longest

    def _slots_for_tokens(self) -> int:
        """How many tokens an empty row has room for without allocating."""
        return self.capacity

    def can_roll_back(self, count: Any) -> bool:
        """Whether `crop` can completely undo appending `count` (int or int32 [B]) tokens. Host only.

        Speculative decoding removes rejected guesses this way.
        """
        return True

    def is_empty(self) -> bool:
        """Whether no row is known to hold a token; always False in `jit`."""
        return is_concrete(self.lengths) and not np.any(np.asarray(self.lengths))

    def clear(self) -> Self:
        """The same cache without tokens."""
        return self.crop(0)

    def crop(self, length: Any) -> Self:
        """Rolls back to the first `length` tokens, an int or int32 [B]; shorter rows stay as they are."""
        return self.replace(lengths=cropped(self.lengths, length))

    def free(self, rows: Any) -> Self:
        """The cache with these rows, int [R], empty; memory that only they used becomes available to other rows."""
        index = check_rows(rows, self.batch_size)
        kept = jnp.full(self.batch_size, self.capacity, jnp.int32)
        return self.crop(kept.at[index].set(0))

    def insert(self, slots: Any, source: Self) -> Self:
        """The cache with its rows `slots` replaced by the rows of `source`.

        In a jitted function that donates this cache the rows are written in place.

        Args:
            slots: int [R], distinct row numbers of this cache.
            source: a cache of R rows with the same layout and settings; its buffers may be smaller.

        Raises:
            CacheError: the caches do not match, or a row number is out of range or repeated.
        """
        index = check_rows(slots, self.batch_size)
        if is_concrete(index) and len(set(np.asarray(index).tolist())) < index.shape[0]:
            raise CacheError(f"slots: expected distinct rows, got {np.asarray(index).tolist()}")
        if source.batch_size != index.shape[0]:
            raise CacheError(f"source: expected {index.shape[0]} rows, one per slot, got {source.batch_size}")
        self._check_alike("insert", source)
        check_fits_into(self, source)
        return axes.insert_rows(self, index, source)

    def select(self, rows: Any) -> Self:
        """A cache with the given rows of this one, int [B'], in that order; rows may be repeated or left out."""
        return axes.select_rows(self, check_rows(rows, self.batch_size))

    def fork(self, branches: int) -> Self:
        """A cache with every row repeated: row b becomes rows b * branches .. (b + 1) * branches - 1.

        Raises:
            CacheError: branches is not a whole number of 1 or more.
        """
        times = whole("branches", branches, CacheError)
        return self.select(np.repeat(np.arange(self.batch_size), times))

    def join(self, others: Sequence[Self]) -> Self:
        """This cache's rows followed by those of the others, which are of the same class; see `concat`.

        Raises:
            CacheError: sizes or settings differ.
        """
        for number, other in enumerate(others, 1):
            self._check_alike(f"concat: caches[{number}]", other)
            check_same_sizes(self, other, number)
        return axes.join_rows((self, *others))

    def _check_alike(self, what: str, other: "KVCache") -> None:
        """Raises CacheError unless the other cache has the same class, settings and model dimensions."""
        check_alike(what, self, other)

    def allocation(self) -> Hashable:
        """A key that is equal for two caches if one, once cleared, can replace the other."""
        leaves, structure = jax.tree.flatten(self)
        return structure, self.batch_size, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves if leaf.ndim >= 3)

    def memory_usage(self) -> int:
        """Exact number of bytes of all arrays of the cache."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        return f"{describe(self)}, with {self.batch_size} rows of up to {self.capacity} tokens"


def replace_item(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    """The tuple with one item replaced."""
    return (*items[:index], item, *items[index + 1 :])
