"""One model over many devices, by JAX's own SPMD: a mesh, and where parameters and caches lie on it.

A mesh has two axes. Rows of a batch, axis B of caches and tokens, go over "data". Heads go over "model": the rows of
each block's `qkv` and `fc`, which are ordered by key/value head, the columns of `attn_proj` and `mlp_proj`, and axis K
of caches. Everything else is on every device, embedding and output projection included: logits are whole on every
device, and need nothing from the others.

The forward pass runs inside `shard_map`, so that each device computes with arrays of its own, by native kernels where
these are built, and the devices tell each other exactly what the pass says: two sums per block over "model", and
nothing over "data". (In a paged cache every page is on all devices of "data", which tell each other the new tokens.)
`Params.mesh` is what all functions go by.
"""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llorch_jax.cache.axes import axes_of
from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import MeshError
from llorch_jax.linear import Dense, Matrix, QuantizedMatrix
from llorch_jax.params import BlockParams, Params
from llorch_jax.tracing import is_concrete, whole

ROWS, HEADS = "data", "model"
Tree = TypeVar("Tree")
AnyModel = TypeVar("AnyModel", bound=Any)  # a `Model`, which this module is below


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """A mesh of the first `data * model` devices; neighbours share a row's heads.

    Args:
        data: number of parts into which the rows of a batch are cut.
        model: number of parts into which heads and dense layers are cut.

    Raises:
        MeshError: a number is not a whole number from 1 up, or there are fewer devices; or, of several processes, one
            would have no device in the mesh.
    """
    sizes = whole(ROWS, data, MeshError), whole(HEADS, model, MeshError)
    wanted, devices = sizes[0] * sizes[1], jax.devices()
    if wanted > len(devices):
        advice = (
            f"; a CPU has more of them if the environment has XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
            " before JAX starts"
        )
        raise MeshError(
            f"mesh: expected at least {wanted} devices for {ROWS}={sizes[0]} and {HEADS}={sizes[1]}, got "
            f"{len(devices)}{advice if devices[0].platform == 'cpu' else ''}"
        )
    if jax.process_count() > 1 and wanted != len(devices):
        raise MeshError(
            f"mesh: expected all {len(devices)} devices of {jax.process_count()} processes in it, got {ROWS}="
            f"{sizes[0]} and {HEADS}={sizes[1]}"
        )
    return Mesh(np.array(devices[:wanted]).reshape(sizes), (ROWS, HEADS))


def shard(model: AnyModel, mesh: Mesh) -> AnyModel:
    """The same model with its parameters spread over a mesh; every function takes it like any other.

    Where there are fewer key/value heads than the axis "model" has devices, each head is repeated on as many devices as
    share it, with a warning: the new model's configuration has the repeated ones.

    Args:
        model: from `load`, on one device; quantized weights stay as they are.
        mesh: from `make_mesh`.

    Raises:
        MeshError: the mesh has other axes, or its axis "model" does not divide the model's heads, its inner width, or
            the groups of columns of quantized weights; or the model has been spread already.
    """
    if not isinstance(mesh, Mesh) or mesh.axis_names != (ROWS, HEADS):
        raise MeshError(f"mesh: expected one of make_mesh, with the axes {ROWS} and {HEADS}, got {mesh!r:.80}")
    if model.params.mesh is not None:
        raise MeshError("model: expected one on a single device, got one that has been spread over a mesh already")
    config, params = _with_enough_heads(model.config, model.params, mesh.shape[HEADS])
    _check_divisible(config, params, mesh.shape[HEADS])
    spread = jax.tree.map(partial(_put, mesh), params, param_specs(params, mesh))
    return dataclasses.replace(model, config=config, params=dataclasses.replace(spread, mesh=mesh))


def axis_of(mesh: Mesh, name: str) -> str | None:
    """The name of an axis, or None if nothing is cut along it."""
    return name if mesh.shape[name] > 1 else None


def rows_axis(mesh: Mesh, rows: int) -> str | None:
    """The axis over which a batch is cut; None if it has no equal parts: then every device computes all rows."""
    return axis_of(mesh, ROWS) if rows % mesh.shape[ROWS] == 0 else None


def param_specs(params: Params, mesh: Mesh) -> Any:
    """`Params` with a PartitionSpec for each array."""
    heads = axis_of(mesh, HEADS)

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(lambda _: PartitionSpec(), tree)

    def by_rows(dense: Dense) -> Dense:
        return jax.tree.map(lambda _: _spec(heads), dense)

    def by_columns(dense: Dense) -> Dense:
        weight: Any = _spec(None, heads)
        if isinstance(dense.weight, QuantizedMatrix):
            scales: Any = _spec() if dense.weight.group_size is None else weight
            weight = dataclasses.replace(dense.weight, codes=weight, scales=scales)
        return Dense(weight, everywhere(dense.bias))

    def block(of: BlockParams) -> BlockParams:
        return BlockParams(
            ln_1=everywhere(of.ln_1),
            qkv=by_rows(of.qkv),
            attn_proj=by_columns(of.attn_proj),
            ln_2=everywhere(of.ln_2),
            fc=by_rows(of.fc),
            mlp_proj=by_columns(of.mlp_proj),
        )

    return dataclasses.replace(everywhere(params), blocks=tuple(block(each) for each in params.blocks))


def cache_specs(cache: KVCache, mesh: Mesh, *, at_rest: bool = False) -> Any:
    """The cache with a PartitionSpec for each array, from the letters of its axes: B over rows, K over heads.

    Between passes of several processes (`at_rest`) only arrays with heads are cut: the others are small, and every
    process looks at them.
    """
    names = {"B": rows_axis(mesh, cache.batch_size), "K": axis_of(mesh, HEADS)}

    def spec(letters: str) -> PartitionSpec:
        if at_rest and mesh.is_multi_process and "K" not in letters:
            return PartitionSpec()
        return _spec(*(names.get(letter) for letter in letters))

    return jax.tree.map(spec, axes_of(cache))


def over_mesh(
    config: GPT2Config, local: Callable[..., Any], params: Params, tokens: Any, cache: Any, count: Any
) -> tuple[Any, Any, Any]:
    """A forward pass on every device of a mesh, in `jit`; arguments and results are those of `model.run`.

    Args:
        config: the model's hyperparameters.
        local: called with one device's part of the parameters, tokens, cache and count.
        params: from `shard`.
        tokens: int32 [B, T].
        cache: of B rows, or None.
        count: int32 [B], or None.

    Raises:
        MeshError: the configuration is not that of the model that `shard` has returned.
    """
    mesh: Any = params.mesh
    expected = (config.n_head + 2 * config.kv_heads) * config.head_dim
    if params.blocks[0].qkv.bias.shape != (expected,):
        raise MeshError(
            f"config: expected that of the model that shard returned, got one with {config.kv_heads} key/value heads"
        )
    rows = _spec(rows_axis(mesh, tokens.shape[0]))
    caches = None if cache is None else cache_specs(cache, mesh)
    run: Callable[..., Any] = jax.shard_map(
        lambda *arrays: tuple(local(arrays[0], tokens=arrays[1], cache=arrays[2], count=arrays[3])),
        mesh=mesh,
        in_specs=(param_specs(params, mesh), rows, caches, rows),
        out_specs=(rows, rows, caches),
        check_vma=False,  # kernels are primitives that it does not know
    )
    logits, hidden, cache = run(params, tokens, cache, count)
    return _for_all_processes(mesh, logits), _for_all_processes(mesh, hidden), pinned(mesh, cache)


def pinned(mesh: Mesh | None, tree: Tree) -> Tree:
    """The tree in `jit`, with caches where `placed` puts them; of several processes, the rest on all devices."""
    if mesh is None:
        return tree

    def pin(node: Any) -> Any:
        if not isinstance(node, KVCache):
            return _for_all_processes(mesh, node)
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
            return jax.tree.map(partial(_put, mesh), node, cache_specs(node, mesh, at_rest=True))
        if isinstance(node, jax.Array) and node.sharding.device_set != set(mesh.devices.flat):
            return _put(mesh, node, PartitionSpec())
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


def check_no_probe(probing: bool) -> None:
    """Raises MeshError for a pass on a mesh that is to show its intermediate values."""
    if probing:
        raise MeshError("intermediates: expected a model on one device, got one spread over a mesh")


def _spec(*names: str | None) -> PartitionSpec:
    """A PartitionSpec in the form in which JAX returns it, without None at the end."""
    while names and names[-1] is None:
        names = names[:-1]
    return PartitionSpec(*names)


def _is_cache(node: Any) -> bool:
    return isinstance(node, KVCache)


def _constrained(mesh: Mesh, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))


def _for_all_processes(mesh: Mesh, leaf: jax.Array) -> jax.Array:
    """An array in `jit` that every process can read."""
    return _constrained(mesh, leaf, PartitionSpec()) if mesh.is_multi_process else leaf


def _put(mesh: Mesh, leaf: Any, spec: PartitionSpec) -> jax.Array:
    """An array on a mesh; the same one if it is there already."""
    target = NamedSharding(mesh, spec)
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(target, leaf.ndim):
        return leaf
    if not mesh.is_multi_process:
        return jax.device_put(leaf, target)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(mesh, jax.random.key_data(leaf), spec), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda array: array, out_shardings=target)(leaf)
    known = np.asarray(leaf)
    return jax.make_array_from_callback(known.shape, target, lambda index: known[index])


def _with_enough_heads(config: GPT2Config, params: Params, devices: int) -> tuple[GPT2Config, Params]:
    """A model whose key/value heads can be divided among devices: where there are too few, repeated ones."""
    heads = config.kv_heads
    if config.n_head % devices:
        raise MeshError(f"mesh: expected a divisor of n_head={config.n_head}, got {HEADS}={devices}")
    if heads % devices and devices % heads:
        raise MeshError(
            f"mesh: expected a divisor or a multiple of the number of key/value heads, {heads}, got {HEADS}={devices}"
        )
    if heads % devices == 0:
        return config, params
    times = devices // heads
    what = "head is" if heads == 1 else "heads are"
    warnings.warn(f"mesh: {heads} key/value {what} repeated {times} times, for {HEADS}={devices} devices", stacklevel=3)
    queries = config.n_head // heads
    rows = np.arange((config.n_head + 2 * heads) * config.head_dim).reshape(heads, queries + 2, -1)
    order = []
    for group in rows:
        for part in np.split(group[:queries], times):
            order += [part.ravel(), group[queries], group[queries + 1]]
    index = jnp.asarray(np.concatenate(order))
    blocks = (
        dataclasses.replace(block, qkv=jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), block.qkv))
        for block in params.blocks
    )
    return dataclasses.replace(config, num_kv_heads=devices), dataclasses.replace(params, blocks=tuple(blocks))


def _check_divisible(config: GPT2Config, params: Params, devices: int) -> None:
    if config.inner_dim % devices:
        raise MeshError(f"mesh: expected a divisor of the inner width {config.inner_dim}, got {HEADS}={devices}")
    for number, block in enumerate(params.blocks):
        for name in ("attn_proj", "mlp_proj"):
            _check_columns(f"block {number}, {name}", getattr(block, name).weight, devices)


def _check_columns(name: str, weight: Matrix, devices: int) -> None:
    """Raises MeshError for a quantized matrix whose columns do not consist of an equal number of groups per device."""
    if devices == 1 or not isinstance(weight, QuantizedMatrix):
        return
    groups = weight.scales.shape[1]
    if weight.padding or (weight.group_size is not None and groups % devices):
        raise MeshError(
            f"mesh: {name}: expected columns in whole groups of {weight.group_size} for each of {HEADS}={devices} "
            f"devices, got {weight.shape[1]} columns in {groups} groups; choose another group_size"
        )
