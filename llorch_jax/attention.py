"""Attention of queries over the keys and values of a cache, in float32.

A cache gives each layer's queries a `KVView`: a cheap description of what they may attend to, and how. `dense` turns
any view into plain arrays, on which the functions here work.
"""

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.kernels import attention as kernels
from llorch_jax.linear import EXACT

MASKED = jnp.finfo(jnp.float32).min
BLOCK = 128  # queries per block


@struct.dataclass
class Queries:
    """The queries of a forward pass; the same for all layers.

    Attributes:
        positions: int32 [B, T].
        count: int32 [B], how many of each row's T queries are real, the others being padding after them; None for all.
        window: the model's sliding window, including the query's own token; None for all tokens. Static.
        start: position of the first query, if it is the same in all rows and slots are in the order of positions; else
            None. Static. A block of queries then skips the slots after its last query.
    """

    positions: jax.Array
    count: jax.Array | None = None
    window: int | None = struct.field(pytree_node=False, default=None)
    start: int | None = struct.field(pytree_node=False, default=None)


class KVView(abc.ABC):
    """What the queries of one layer may attend to."""

    if TYPE_CHECKING:  # added to the concrete classes by struct.dataclass

        def replace(self, **changes: Any) -> Self: ...

    @abc.abstractmethod
    def dense(self) -> "DenseView":
        """The same as plain arrays, against which every other way to attend is tested."""

    def attend(self, q: jax.Array, queries: Queries, scale: float) -> jax.Array:
        """Softmax attention float32 [B, T, N, H] of queries [B, T, N, H]; see `attend`."""
        return attend(q, self.dense(), queries, scale)


@struct.dataclass
class DenseView(KVView):
    """Keys and values in plain arrays.

    Attributes:
        k: [B, K, S, H].
        v: [B, K, S, H].
        positions: int32 [B, S] or [1, S], or [B, K, S] if heads hold different tokens: the position of the token in
            each slot; negative if the slot is empty. A slot whose position lies after a query's is masked by
            causality, so stale slots past the end may keep any later position.
        window: number of newest tokens that a query attends to, including its own; None for all.
        sinks: number of first positions attended to regardless of the window.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    window: int | None = struct.field(pytree_node=False, default=None)
    sinks: int = struct.field(pytree_node=False, default=0)

    def dense(self) -> "DenseView":
        return self

    def attend(self, q: jax.Array, queries: Queries, scale: float) -> jax.Array:
        """As `KVView.attend`, by a native kernel if the vectors are float32."""
        form = kernels.Form(32, scale, queries.window or 0, self.window or 0, self.sinks)
        fits = self.k.dtype == jnp.float32 and self.v.dtype == jnp.float32
        if not fits or not kernels.serves(form, q, self.k.shape[1], 0):
            return super().attend(q, queries, scale)
        return attend_natively(form, q, self, queries, scale)

    def operands(self, q: jax.Array, queries: Queries) -> kernels.Operands:
        none = jnp.zeros(0, jnp.float32)
        return kernels.Operands(
            q=q,
            query_positions=queries.positions,
            keys=kernels.Vectors(self.k, none, none),
            values=kernels.Vectors(self.v, none, none),
            positions=self.positions[:, None] if self.positions.ndim == 2 else self.positions,
            tables=jnp.zeros((0, 0), jnp.int32),
            exact=(),
        )


class NativeView(Protocol):
    """A view that the native kernels can read."""

    def dense(self) -> DenseView: ...

    def operands(self, q: jax.Array, queries: Queries) -> kernels.Operands:
        """What the kernels read, for queries q [B, T, N, H]."""
        ...


def attend_natively(form: kernels.Form, q: jax.Array, view: NativeView, queries: Queries, scale: float) -> jax.Array:
    """`KVView.attend` by a native kernel; `kernels.serves` must have accepted the queries."""
    arrays, structure = jax.tree.flatten((q, view, queries))
    with jax.named_scope("attention"):
        return kernels.attend(form, _Attention(structure, scale), *arrays)


@dataclasses.dataclass(frozen=True)
class _Attention:
    """How to attend to a view, given its arrays; a `kernels.Call`.

    Attributes:
        structure: structure of the tuple of the queries' vectors, the view and the `Queries`.
        scale: factor of the scores.
    """

    structure: Any
    scale: float

    def operands(self, *arrays: jax.Array) -> kernels.Operands:
        q, view, queries = jax.tree.unflatten(self.structure, arrays)
        operands: kernels.Operands = view.operands(q, queries)
        return operands

    def plain(self, *arrays: jax.Array) -> jax.Array:
        q, view, queries = jax.tree.unflatten(self.structure, arrays)
        return attend(q, view.dense(), queries, self.scale)


def allowed_slots(positions: jax.Array, view: DenseView, window: int | None) -> jax.Array:
    """Which slots a query may attend to: filled, not after the query and, with a window, among the newest.

    Args:
        positions: positions of the queries, int32 [B, T].
        view: what the cache holds; it may have an additional window, with sinks.
        window: the model's sliding window, including the query's own token; None for all tokens.

    Returns:
        bool [B, 1, T, S], or [B, K, T, S] if heads hold different tokens.
    """
    slot = view.positions[:, None, None] if view.positions.ndim == 2 else view.positions[:, :, None]
    query = positions[:, None, :, None]
    allowed = (slot >= 0) & (slot <= query)
    if window is not None:
        allowed &= slot > query - window
    if view.window is not None:
        allowed &= (slot > query - view.window) | (slot < view.sinks)
    return allowed


def attention_scores(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    """Scaled dot products (Vaswani et al. 2017, section 3.2.1), before the mask.

    Args:
        q: [B, T, N, H].
        k: [B, K, S, H]; each key head serves N / K query heads.
        scale: factor.

    Returns:
        float32 [B, K, N / K, T, S].
    """
    batch, count, heads, head_dim = q.shape
    grouped = q.reshape(batch, count, k.shape[1], heads // k.shape[1], head_dim)
    return jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k.astype(jnp.float32), precision=EXACT) * scale


@jax.named_scope("attention")
def attend(q: jax.Array, view: DenseView, queries: Queries, scale: float) -> jax.Array:
    """Softmax attention of every query over the slots that it may attend to.

    Queries are processed in blocks, so that the scores in memory are [B, N, BLOCK, S] and not [B, N, T, S].

    Args:
        q: [B, T, N, H].
        view: keys and values of one layer.
        queries: positions and window of the queries.
        scale: factor of the scores.

    Returns:
        float32 [B, T, N, H].
    """
    count = q.shape[1]
    slots = view.k.shape[2]
    if count == 1:
        return _attend_single(q, view, queries, scale)
    batch, *_, head_dim = q.shape
    # [B, K, H, N / K, T]
    by_head = q.reshape(batch, count, view.k.shape[1], -1, head_dim).transpose(0, 2, 4, 3, 1)
    values = view.v.astype(jnp.float32).swapaxes(2, 3)
    blocks = []
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        end = slots if queries.start is None else min(queries.start + last, slots)
        seen = view.replace(k=view.k[:, :, :end], positions=view.positions[..., :end])
        allowed = allowed_slots(queries.positions[:, first:last], seen, queries.window)
        blocks.append(_attend_block(by_head[..., first:last], seen.k, values[..., :end], allowed, scale))
    out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=-1)
    return out.transpose(0, 4, 1, 3, 2).reshape(q.shape)


def attention_mass(q: jax.Array, view: DenseView, queries: Queries, scale: float, voters: jax.Array) -> jax.Array:
    """The attention that each slot receives from some of the queries, summed over these and the heads of a group.

    Args:
        q: [B, T, N, H].
        view: keys and values of one layer.
        queries: positions and window of the queries.
        scale: factor of the scores.
        voters: indices of the queries that count, int32 [B, W]; negative for none.

    Returns:
        float32 [B, K, S].
    """
    chosen = jnp.maximum(voters, 0)
    q = jnp.take_along_axis(q, chosen[..., None, None], 1)
    positions = jnp.take_along_axis(queries.positions, chosen, 1)
    total = jnp.zeros(view.k.shape[:3], jnp.float32)
    for first in range(0, voters.shape[1], BLOCK):
        block = slice(first, first + BLOCK)
        weights = _attention_weights(q[:, block], view, positions[:, block], scale, queries.window)
        counted = (voters[:, block] >= 0)[:, None, None, :, None]
        total += jnp.sum(jnp.where(counted, weights, 0), axis=(2, 3))
    return total


def _attention_weights(
    q: jax.Array, view: DenseView, positions: jax.Array, scale: float, window: int | None
) -> jax.Array:
    """float32 [B, K, N / K, T, S]."""
    scores = attention_scores(q, view.k, scale)
    allowed = allowed_slots(positions, view, window)[:, :, None]
    return jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)


def _attend_block(q: jax.Array, k: jax.Array, values: jax.Array, allowed: jax.Array, scale: float) -> jax.Array:
    """A block of queries, [B, K, H, N / K, T] like the result, attends to k [B, K, S, H] and values [B, K, H, S].

    With slots before queries both products are of a matrix and columns, the form that is fastest on XLA's CPU backend.
    """
    scores = jnp.einsum("BKSH,BKHGT->BKSGT", k.astype(jnp.float32), q, precision=EXACT) * scale
    allowed = allowed.swapaxes(2, 3)[:, :, :, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=2)
    return jnp.einsum("BKHS,BKSGT->BKHGT", values, weights, precision=EXACT)


def _attend_single(q: jax.Array, view: DenseView, queries: Queries, scale: float) -> jax.Array:
    """Attention of one query per row. In this form XLA's CPU backend reads keys and values in place, without a copy."""
    batch, *_, head_dim = q.shape
    grouped = q.reshape(batch, view.k.shape[1], -1, head_dim)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, view.k.astype(jnp.float32), precision=EXACT) * scale
    allowed = allowed_slots(queries.positions, view, queries.window)
    weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)
    out = jnp.einsum("BKGS,BKSH->BKGH", weights, view.v.astype(jnp.float32), precision=EXACT)
    return out.reshape(q.shape)
