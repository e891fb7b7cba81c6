"""What every KV cache has in common: the protocol that the model and the decoding loops know, and host-side checks."""

import abc
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError, CapacityError


class KVView(NamedTuple):
    """The keys and values that the queries of one layer may look at.

    Attributes:
        k: [B, K, S, H].
        v: [B, K, S, H].
        positions: int32 [B, S] or [1, S], the position of the token in each slot; negative where a slot is empty.
            A slot whose position lies after a query's is masked by causality, so stale slots past the end may keep
            any later position.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array


class KVCache(abc.ABC):
    """An immutable KV cache: every operation returns a new cache and leaves this one as it was.

    Rows are independent sequences. Row b holds `lengths[b]` tokens; the next token of the row gets position
    `lengths[b]`. A forward pass calls `append` once per layer and then `advance` once.

    Concrete caches are `flax.struct` dataclasses. Outside `jit` an operation copies the arrays it changes. Inside a
    jitted function that donates the cache, as `decode_step` does, the same operations write in place.
    """

    lengths: Any  # int32 [B]; a field of every concrete cache

    @classmethod
    @abc.abstractmethod
    def init(cls, config: GPT2Config, **settings: Any) -> Self:
        """An empty cache for models of this configuration."""

    @property
    @abc.abstractmethod
    def batch_size(self) -> int:
        """Number of rows B."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """The largest number of tokens that a row can hold."""

    @abc.abstractmethod
    def update(self, layer: int, k: jax.Array, v: jax.Array) -> Self:
        """Writes T new tokens of one layer behind each row's end; `advance` makes them part of the row.

        Args:
            layer: which layer, 0 .. L - 1.
            k: keys [B, T, K, H].
            v: values [B, T, K, H].

        Raises:
            CacheError: layer or shapes do not fit.
            CapacityError: a row has no room for T tokens (checked outside `jit` only).
        """

    @abc.abstractmethod
    def read(self, layer: int) -> KVView:
        """Everything that one layer holds, tokens just written by `update` included."""

    def append(self, layer: int, k: jax.Array, v: jax.Array) -> tuple[Self, KVView]:
        """`update`, and what the queries of these T tokens may look at."""
        cache = self._update(layer, k, v)
        return cache, cache.read(layer)

    @abc.abstractmethod
    def _update(self, layer: int, k: jax.Array, v: jax.Array) -> Self:
        """`update` without its checks of capacity."""

    @abc.abstractmethod
    def advance(self, count: Any) -> Self:
        """Lengthens every row by `count` tokens, an int or int32 [B], that `update` has written in all layers."""

    @abc.abstractmethod
    def clear(self) -> Self:
        """The same cache with no token in it."""

    @abc.abstractmethod
    def crop(self, length: Any) -> Self:
        """Rolls back to the first `length` tokens, an int or int32 [B]; shorter rows stay as they are."""

    @abc.abstractmethod
    def select(self, rows: Any) -> Self:
        """A cache whose rows are the given rows of this one, int [B']; rows may repeat, move or be left out."""

    def memory_usage(self) -> int:
        """Bytes of all arrays of the cache, exactly."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def is_concrete(*values: Any) -> bool:
    """Whether all values are known now, that is outside a traced function."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def check_room(lengths: Any, count: Any, capacity: int) -> None:
    """Raises CapacityError where a row of `lengths` int32 [B] has no room for `count` (int or int32 [B]) more tokens."""
    if not is_concrete(lengths, count):
        return
    lengths = np.asarray(lengths)
    needed = lengths + np.asarray(count)
    row = int(np.argmax(needed))
    if needed[row] > capacity:
        raise CapacityError(
            f"cache: row {row} holds {lengths[row]} tokens and {needed[row] - lengths[row]} more were to be added, "
            f"which makes {needed[row]}; its capacity is {capacity}"
        )


def check_new_tokens(layer: int, k: jax.Array, v: jax.Array, expected: tuple[int, int, int], layers: int) -> None:
    """Raises CacheError unless k and v are [B, T, K, H] with `expected` = (B, K, H) and the layer exists."""
    if not 0 <= layer < layers:
        raise CacheError(f"layer: expected 0 .. {layers - 1}, got {layer}")
    batch, heads, head_dim = expected
    for name, array in (("k", k), ("v", v)):
        shape = tuple(array.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != expected or shape[1] < 1:
            raise CacheError(f"{name}: expected shape [{batch}, T, {heads}, {head_dim}], got {list(shape)}")
    if k.shape != v.shape:
        raise CacheError(f"v: expected as many tokens as k, {k.shape[1]}, got {v.shape[1]}")


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
    if is_concrete(length) and np.any(np.asarray(length) < 0):
        raise CacheError(f"crop: expected a length of 0 or more, got {length}")
    return jnp.minimum(lengths, jnp.asarray(length, jnp.int32))
