"""Named axes of a cache's arrays, and the operations that need only these names: on rows, and growing.

A field of a cache names the leading axes of its arrays once:

    keys: tuple[Stored, ...] = array("BKS")

B is rows, K key/value heads, S slots, P pages, C slots of a page, N blocks of a block table, R slots of a ring, L
cache layers. Every leaf below the field begins with these axes; codecs add further axes, which have no letter. Fields
that hold dataclasses, such as `Recent`, have the axes that those name.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

Tree = TypeVar("Tree")


def array(axes: str, **settings: Any) -> Any:
    """A field of arrays with these leading axes."""
    return struct.field(metadata={"axes": axes}, **settings)


def setting(**settings: Any) -> Any:
    """A static field: part of the structure, not of the arrays."""
    return struct.field(pytree_node=False, **settings)


def axes_of(tree: Any) -> Any:
    """The tree with each array replaced by the string of its leading axes.

    Args:
        tree: a dataclass whose fields are made by `array` and `setting`.
    """
    named = {}
    for field in dataclasses.fields(tree):
        if is_setting(field):
            continue
        value = getattr(tree, field.name)
        named[field.name] = _axes_below(value, field.metadata.get("axes"))
    return dataclasses.replace(tree, **named)


def _axes_below(value: Any, axes: str | None) -> Any:
    if axes is not None:
        return jax.tree.map(lambda _: axes, value)
    if isinstance(value, tuple):
        return tuple(axes_of(item) for item in value)
    return axes_of(value)


def is_setting(field: "dataclasses.Field[Any]") -> bool:
    """Whether a field of a cache is static, that is, holds no arrays."""
    return not field.metadata.get("pytree_node", True)


def row_shapes(tree: Any) -> list[tuple[int, ...]]:
    """The shape of one row's part of every array that has rows."""

    def of_row(leaf: Any, axes: str) -> tuple[int, ...]:
        axis = axes.index("B")
        return (*leaf.shape[:axis], *leaf.shape[axis + 1 :])

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(axes_of(tree)), strict=True)
    return [of_row(leaf, axes) for leaf, axes in pairs if "B" in axes]


def select_rows(tree: Tree, rows: jax.Array) -> Tree:
    """The given rows int32 [B'] of every array that has rows; other arrays, such as pools, are unchanged."""

    def chosen(leaf: jax.Array, axes: str) -> jax.Array:
        return jnp.take(leaf, rows, axis=axes.index("B")) if "B" in axes else leaf

    return jax.tree.map(chosen, tree, axes_of(tree))


def join_rows(trees: Sequence[Tree]) -> Tree:
    """The rows of all trees, in order; arrays without rows are taken from the first tree."""

    def joined(axes: str, *leaves: jax.Array) -> jax.Array:
        return jnp.concatenate(leaves, axis=axes.index("B")) if "B" in axes else leaves[0]

    return jax.tree.map(joined, axes_of(trees[0]), *trees)


def insert_rows(tree: Tree, slots: jax.Array, source: Tree) -> Tree:
    """The tree with its rows `slots` int32 [R] replaced by the rows of `source`.

    Arrays of the source may be shorter along S; they then fill the first slots. Rows are written one at a time, by
    updates of slices, which XLA does in place if the tree is donated.
    """

    def inserted(leaf: jax.Array, axes: str, new: jax.Array) -> jax.Array:
        return _insert(leaf, slots, new, axes.index("B")) if "B" in axes else leaf

    return jax.tree.map(inserted, tree, axes_of(tree), source)


@partial(jax.jit, static_argnums=3, inline=True)  # compiled once for calls outside jit
def _insert(leaf: jax.Array, slots: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    def insert(row: Any, filled: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(new, row, 1, axis)
        start = [jnp.int32(0)] * leaf.ndim
        start[axis] = slots[row]
        return lax.dynamic_update_slice(filled, block.astype(leaf.dtype), start)

    return lax.fori_loop(0, slots.shape[0], insert, leaf)


def grow_slots(tree: Tree, slots: int) -> Tree:
    """The tree with at least `slots` slots in every array that has an axis S; new ones are zeros."""

    def grown(leaf: jax.Array, axes: str) -> jax.Array:
        more = [(0, 0)] * leaf.ndim
        if "S" in axes:
            axis = axes.index("S")
            more[axis] = (0, max(0, slots - leaf.shape[axis]))
        return jnp.pad(leaf, more) if any(after for _, after in more) else leaf

    return jax.tree.map(grown, tree, axes_of(tree))
