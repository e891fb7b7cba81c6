"""Meshes of devices, and how a model's parameters are cut along their axes."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llorch_jax.config import GPT2Config
from llorch_jax.cores import enough_threads
from llorch_jax.errors import MeshError
from llorch_jax.linear import Dense, Matrix, QuantizedMatrix
from llorch_jax.params import BlockParams, Params
from llorch_jax.tracing import whole

ROWS, HEADS = "data", "model"


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
    wanted = sizes[0] * sizes[1]
    with enough_threads(wanted):
        devices = jax.devices()
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


def axis_of(mesh: Mesh, name: str) -> str | None:
    """The name of an axis, or None if nothing is cut along it."""
    return name if mesh.shape[name] > 1 else None


def rows_axis(mesh: Mesh, rows: int) -> str | None:
    """The axis over which a batch is cut; None if it has no equal parts: then every device computes all rows."""
    return axis_of(mesh, ROWS) if rows % mesh.shape[ROWS] == 0 else None


def spec_of(*names: str | None) -> PartitionSpec:
    """A PartitionSpec in the form in which JAX returns it, without None at the end."""
    while names and names[-1] is None:
        names = names[:-1]
    return PartitionSpec(*names)


def param_specs(params: Params, mesh: Mesh) -> Any:
    """`Params` with a PartitionSpec for each array."""
    heads = axis_of(mesh, HEADS)

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(lambda _: PartitionSpec(), tree)

    def by_rows(dense: Dense) -> Dense:
        return jax.tree.map(lambda _: spec_of(heads), dense)

    def by_columns(dense: Dense) -> Dense:
        weight: Any = spec_of(None, heads)
        if isinstance(dense.weight, QuantizedMatrix):
            scales: Any = spec_of() if dense.weight.group_size is None else weight
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


def specs_of(params: Params, mesh: Mesh | None) -> list[NamedSharding | None]:
    """Where each leaf of a tree like `Params` belongs on a mesh, in order; None for each without one."""
    if mesh is None:
        return [None] * len(jax.tree.leaves(params))
    places = jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), params, param_specs(params, mesh))
    return jax.tree.leaves(places)


def with_enough_heads(config: GPT2Config, params: Params, devices: int) -> tuple[GPT2Config, Params]:
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


def check_divisible(config: GPT2Config, params: Params, devices: int) -> None:
    if config.inner_dim % devices:
        raise MeshError(f"mesh: expected a divisor of the inner width {config.inner_dim}, got {HEADS}={devices}")
    for number, block in enumerate(params.blocks):
        for name in ("attn_proj", "mlp_proj"):
            _check_columns(f"block {number}, {name}", getattr(block, name).weight, devices)


def _check_columns(name: str, weight: Matrix, devices: int) -> None:
    """Raises MeshError for a quantized matrix whose columns do not consist of an equal number of groups per device."""
    if devices == 1 or not isinstance(weight, QuantizedMatrix):
        return
    if weight.x_bits == 8:
        raise MeshError(
            f"mesh: {name}: expected weights whose activations are not rounded, such as int8, for {HEADS}={devices} "
            "devices, got w8a8: each device would round its part of a token by itself"
        )
    groups = weight.scales.shape[1]
    if weight.padding or (weight.group_size is not None and groups % devices):
        raise MeshError(
            f"mesh: {name}: expected columns in whole groups of {weight.group_size} for each of {HEADS}={devices} "
            f"devices, got {weight.shape[1]} columns in {groups} groups; choose another group_size"
        )
