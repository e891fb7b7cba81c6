"""What every KV cache has in common: the protocol that the model and the decoding loops know, and host-side checks."""

import abc
import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.attention import KVView
from llorch_jax.cache.codecs.floats import dtype_of
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError, CapacityError
from llorch_jax.tracing import is_concrete, is_whole

Cache = TypeVar("Cache", bound="KVCache")


class KVCache(abc.ABC):
    """An immutable KV cache: every operation returns a new cache and leaves this one as it was.

    Rows are independent sequences. Row b holds `lengths[b]` tokens; the next token of the row gets position
    `lengths[b]`. A forward pass calls `reserve` once on the host, then, in `jit`, `append` once per layer that owns
    keys and values, and then `advance` once.

    Concrete caches are `flax.struct` dataclasses with a factory `init(config, *, batch_size, ...)`. Outside `jit` an
    operation copies the arrays it changes. Inside a jitted function that donates the cache, as `decode_step` does, the
    same operations write in place.

    A `layer` here is the number of a cache layer, 0 .. config.cache_layers - 1. It is the number of the block unless
    blocks share keys and values (`GPT2Config.kv_sharing`).
    """

    lengths: Any  # int32 [B]; a field of every concrete cache
    in_order: ClassVar[bool] = True  # whether, before anything was dropped, slot s holds position s
    shares_slots: ClassVar[bool] = False  # whether rows that `select` repeats need `reserve` before they write

    if TYPE_CHECKING:  # flax.struct.dataclass adds it to the concrete classes

        def replace(self, **changes: Any) -> Self: ...

    @property
    @abc.abstractmethod
    def batch_size(self) -> int:
        """Number of rows B."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """The largest number of tokens that a row can ever hold."""

    @property
    @abc.abstractmethod
    def layout(self) -> tuple[int, int, int]:
        """Number of cache layers, kv heads K and head_dim H."""

    def update(self, layer: int, k: jax.Array, v: jax.Array, count: Any = None) -> Self:
        """Writes T new tokens of one layer behind each row's end; `advance` makes them part of the row.

        Args:
            layer: which cache layer.
            k: keys [B, T, K, H].
            v: values [B, T, K, H].
            count: int32 [B], how many of each row's T tokens are real, the others being padding behind them; None
                means all.

        Raises:
            CacheError: layer or shapes do not fit.
            CapacityError: a row has no room for the tokens (checked outside `jit` only).
        """
        check_new_tokens(layer, k, v, self.batch_size, self.layout, count)
        return self.reserve(k.shape[1] if count is None else count)._write(layer, k, v, count)

    def append(self, layer: int, k: jax.Array, v: jax.Array, count: Any = None) -> tuple[Self, KVView]:
        """`update` without checks, and what the queries of these T tokens may look at."""
        with jax.named_scope("cache_update"):
            cache = self._write(layer, k, v, count)
        return cache, cache.read(layer)

    @abc.abstractmethod
    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        """`update` without its checks."""

    @abc.abstractmethod
    def read(self, layer: int) -> KVView:
        """Everything that one layer holds, tokens just written by `update` included."""

    @abc.abstractmethod
    def advance(self, count: Any) -> Self:
        """Lengthens every row by `count` tokens, an int or int32 [B], that `update` has written in all layers."""

    @property
    def slots_in_jit(self) -> int:
        """How many tokens an empty row can be given in `jit`, where nothing can be allocated."""
        return self.capacity

    def voters(self, new: int, count: Any) -> jax.Array | None:
        """Which of T new queries' attention `observe` is to be shown, int32 [B, W]; None: of none, as for most layouts.

        Args:
            new: T.
            count: int32 [B], how many of them are real; None means all.
        """
        return None

    def observe(self, layer: int, mass: jax.Array) -> Self:
        """Takes note of the attention, float32 [B, K, S], that a layer's slots got from the `voters`."""
        return self

    def held_positions(self) -> jax.Array:
        """int32 [B, S] or [1, S], the position that each slot holds in all layers and heads; negative where none."""
        return self.read(0).positions

    def check_room(self, count: Any) -> None:
        """Raises CapacityError where a row can never have room for `count` (int or int32 [B]) more tokens."""
        check_room(self.lengths, count, self.capacity)

    def reserve(self, count: Any) -> Self:
        """A cache that can be given `count` (int or int32 [B]) more tokens per row in `jit`. Call it on the host.

        Layouts that allocate as they grow do so here; the others only check.

        Raises:
            CapacityError: there is no room for them.
        """
        self.check_room(count)
        return self

    def room(self, active: Any = None) -> int:
        """How many tokens the rows can be given in `jit` before `reserve` must be called again. Host only.

        Args:
            active: bool [B], the rows that will be given tokens, one at least; None means all.
        """
        return self.capacity - int(np.max(active_rows(self.lengths, active)))

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

    @abc.abstractmethod
    def crop(self, length: Any) -> Self:
        """Rolls back to the first `length` tokens, an int or int32 [B]; shorter rows stay as they are."""

    @abc.abstractmethod
    def select(self, rows: Any) -> Self:
        """A cache whose rows are the given rows of this one, int [B']; rows may repeat, move or be left out."""

    def fork(self, branches: int) -> Self:
        """Every row `branches` times, one after the other: row b becomes rows b * branches .. (b + 1) * branches - 1.

        Raises:
            CacheError: branches is not a whole number from 1 up.
        """
        if type(branches) is not int or branches < 1:
            raise CacheError(f"branches: expected a whole number from 1 up, got {branches!r}")
        return self.select(np.repeat(np.arange(self.batch_size), branches))

    def join(self, others: Sequence[Self]) -> Self:
        """This cache's rows and behind them those of the others, which are of the same class; see `concat`.

        Raises:
            CacheError: sizes or settings differ.
        """
        return join_rows((self, *others))

    def allocation(self) -> Hashable:
        """What must be equal in two caches for one to do in place of the other once it is cleared."""
        leaves, structure = jax.tree.flatten(self)
        return structure, self.batch_size, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves if leaf.ndim >= 3)

    def memory_usage(self) -> int:
        """Bytes of all arrays of the cache, exactly."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def active_rows(values: Any, active: Any) -> np.ndarray:
    """Those of the values [B] whose row is active, bool [B]; None means all."""
    known = np.asarray(values)
    return known if active is None else known[np.asarray(active)]


def check_room(lengths: Any, count: Any, capacity: int) -> None:
    """Raises CapacityError where a row of `lengths` int32 [B] has no room for `count`, int or int32 [B], more."""
    if not is_concrete(lengths, count):
        return
    lengths, count = np.asarray(lengths), np.asarray(count)
    if count.dtype.kind not in "iu" or count.shape not in ((), lengths.shape) or np.any(count < 0):
        raise CacheError(f"count: expected numbers from 0 up, one or one per row, got {count.tolist()}")
    needed = lengths + count
    row = int(np.argmax(needed))
    if needed[row] > capacity:
        raise CapacityError(
            f"cache: row {row} holds {lengths[row]} tokens and {needed[row] - lengths[row]} more were to be added, "
            f"which makes {needed[row]}; its capacity is {capacity}"
        )


def check_new_tokens(
    layer: int, k: jax.Array, v: jax.Array, batch_size: int, layout: tuple[int, int, int], count: Any
) -> None:
    """Raises CacheError unless the layer exists, k and v are [B, T, K, H] as `layout` says, and counts are up to T."""
    layers, *heads = layout
    if not 0 <= layer < layers:
        raise CacheError(f"layer: expected 0 .. {layers - 1}, got {layer}")
    for name, array in (("k", k), ("v", v)):
        shape = list(array.shape)
        if len(shape) != 4 or shape[0] != batch_size or shape[1] < 1 or shape[2:] != heads:
            raise CacheError(f"{name}: expected shape [{batch_size}, T, {heads[0]}, {heads[1]}], got {shape}")
    if k.shape != v.shape:
        raise CacheError(f"v: expected as many tokens as k, {k.shape[1]}, got {v.shape[1]}")
    if count is not None and is_concrete(count) and np.any(np.asarray(count) > k.shape[1]):
        raise CacheError(f"count: expected at most {k.shape[1]}, the tokens given, got {np.asarray(count).tolist()}")


def check_sizes(config: GPT2Config, batch_size: int, capacity: int) -> None:
    """Raises CacheError or CapacityError for an impossible batch size or capacity."""
    if not is_whole(batch_size) or batch_size < 1:
        raise CacheError(f"batch_size: expected 1 or more, got {batch_size!r}")
    if not is_whole(capacity) or not 1 <= capacity <= config.n_positions:
        raise CapacityError(f"capacity: expected 1 .. n_positions={config.n_positions}, got {capacity!r}")


def check_rows(rows: Any, batch_size: int) -> jax.Array:
    """Row numbers as int32 [B'], checked against the batch size where they are known."""
    if is_concrete(rows):
        known = np.asarray(rows)
        if known.ndim != 1 or known.size == 0 or known.dtype.kind not in "iu":
            raise CacheError(f"rows: expected a list of row numbers, got {rows!r}")
        if known.min() < 0 or known.max() >= batch_size:
            raise CacheError(f"rows: expected row numbers 0 .. {batch_size - 1}, got {known.tolist()}")
    return jnp.asarray(rows, jnp.int32)


def cropped(lengths: jax.Array, length: Any) -> jax.Array:
    """Row lengths after rolling back to at most `length`, an int or int32 [B]."""
    if is_concrete(length):
        known = np.asarray(length)
        if known.dtype.kind not in "iu" or known.shape not in ((), lengths.shape) or np.any(known < 0):
            raise CacheError(f"crop: expected whole numbers from 0 up, one or {lengths.size}, got {length!r}")
    return jnp.minimum(lengths, jnp.asarray(length, jnp.int32))


def join_rows(caches: Sequence[Cache]) -> Cache:
    """The rows of caches of one class, whose arrays all have the rows as first axis, in one cache.

    Raises:
        CacheError: sizes or settings differ.
    """
    first = caches[0]
    for number, cache in enumerate(caches):
        expected, got = (_row_description(each) for each in (first, cache))
        if expected != got:
            raise CacheError(f"concat: expected caches of the same settings, {expected}, got {got} in caches[{number}]")
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *caches)


def _row_description(cache: Any) -> str:
    """The class, settings, and shapes per row of a cache."""
    settings = [f"{f.name}={getattr(cache, f.name)}" for f in dataclasses.fields(cache) if is_setting(f)]
    arrays = sorted({f"{dtype_of(leaf).name}{list(leaf.shape[1:])}" for leaf in jax.tree.leaves(cache)})
    return f"{type(cache).__name__}({', '.join(settings)}) of {cache.layout[0]} layers and arrays {' '.join(arrays)}"


def is_setting(field: dataclasses.Field) -> bool:
    """Whether a field of a cache is static, that is no part of its arrays."""
    return not field.metadata.get("pytree_node", True)


def replace_item(items: tuple, index: int, item: Any) -> tuple:
    """The tuple with one item replaced."""
    return (*items[:index], item, *items[index + 1 :])
