"""Where caches and other arrays lie on a mesh: axis B over its axis "data", axis K over "model"."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llorch_jax.cache.axes import axes_of
from llorch_jax.cache.base import KVCache
from llorch_jax.meshes import HEADS, axis_of, rows_axis, spec_of
from llorch_jax.tracing import is_concrete

Tree = TypeVar("Tree")


def cache_specs(cache: KVCache, mesh: Mesh, *, at_rest: bool = False) -> Any:
    """The cache with a PartitionSpec for each array, from the letters of its axes: B over rows, K over heads.

    Between passes of several processes (`at_rest`) only arrays with heads are cut: the others are small, and every
    process looks at them.
    """
    names = {"B": rows_axis(mesh, cache.batch_size), "K": axis_of(mesh, HEADS)}

    def spec(letters: str) -> PartitionSpec:
        if at_rest and mesh.is_multi_process and "K" not in letters:
            return PartitionSpec()
        return spec_of(*(names.get(letter) for letter in letters))

    return jax.tree.map(spec, axes_of(cache))


def pinned(mesh: Mesh | None, tree: Tree) -> Tree:
    """The tree in `jit`, with caches where `placed` puts them; of several processes, the rest on all devices."""
    if mesh is None:
        return tree

    def pin(node: Any) -> Any:
        if not isinstance(node, KVCache):
            return for_all_processes(mesh, node)
        specs = cache_specs(node, mesh, at_rest=True)
        return jax.tree.map(lambda leaf, spec: _constrained(mesh, leaf, spec), node, specs)

    return jax.tree.map(pin, tree, is_leaf=_is_cache)


def placed(mesh: Mesh | None, tree: Tree) -> Tree:
    """The tree with every cache in it, and every array of other devices, on a mesh; what is there already stays.

    Does nothing without a mesh, and in `jit`. NumPy arrays stay what they are: a program takes them as they come.
    """
    if mesh is None or not is_concrete(tree):
        return tree

    def place(node: Any) -> Any:
        if isinstance(node, KVCache):
            return jax.tree.map(partial(put_on, mesh), node, cache_specs(node, mesh, at_rest=True))
        if isinstance(node, jax.Array) and node.sharding.device_set != set(mesh.devices.flat):
            return put_on(mesh, node, PartitionSpec())
        return node

    return jax.tree.map(place, tree, is_leaf=_is_cache)


def new_cache(mesh: Mesh | None, make: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """`make(*arguments, **settings)`, an empty cache, made where it belongs: no device ever holds all of it."""
    if mesh is None:
        return make(*arguments, **settings)
    recipe = make, arguments, tuple(settings.items())
    try:
        hash(recipe)
    except TypeError:
        return placed(mesh, make(*arguments, **settings))
    return _made(mesh, recipe)


@partial(jax.jit, static_argnums=(0, 1))
def _made(mesh: Mesh, recipe: Any) -> Any:
    make, arguments, settings = recipe
    return pinned(mesh, make(*arguments, **dict(settings)))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which the arrays of a tree lie, by the first of them; None for those of a single device."""
    sharding = next(leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _is_cache(node: Any) -> bool:
    return isinstance(node, KVCache)


def _constrained(mesh: Mesh, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))


def for_all_processes(mesh: Mesh, leaf: jax.Array) -> jax.Array:
    """An array in `jit` that every process can read."""
    return _constrained(mesh, leaf, PartitionSpec()) if mesh.is_multi_process else leaf


def put_on(mesh: Mesh, leaf: Any, spec: PartitionSpec) -> jax.Array:
    """An array on a mesh; the same one if it is there already."""
    target = NamedSharding(mesh, spec)
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(target, leaf.ndim):
        return leaf
    if not mesh.is_multi_process:
        return jax.device_put(leaf, target)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put_on(mesh, jax.random.key_data(leaf), spec), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda array: array, out_shardings=target)(leaf)
    known = np.asarray(leaf)
    return jax.make_array_from_callback(known.shape, target, lambda index: known[index])
