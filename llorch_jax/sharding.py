"""One model over many devices, by JAX's own SPMD: `shard`, and the forward pass on a mesh.

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
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from llorch_jax.cache.placement import cache_specs, for_all_processes, pinned, put_on
from llorch_jax.config import GPT2Config
from llorch_jax.errors import MeshError
from llorch_jax.meshes import (
    HEADS,
    ROWS,
    check_divisible,
    param_specs,
    rows_axis,
    spec_of,
    with_enough_heads,
)
from llorch_jax.params import Params

AnyModel = TypeVar("AnyModel", bound=Any)  # a `Model`, which this module is below


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
    check_mesh(mesh)
    if model.params.mesh is not None:
        raise MeshError("model: expected one on a single device, got one that has been spread over a mesh already")
    config, params = with_enough_heads(model.config, model.params, mesh.shape[HEADS])
    check_divisible(config, params, mesh.shape[HEADS])
    spread = jax.tree.map(partial(put_on, mesh), params, param_specs(params, mesh))
    return dataclasses.replace(model, config=config, params=dataclasses.replace(spread, mesh=mesh))


def check_mesh(mesh: Any) -> None:
    """Raises MeshError unless this is a mesh of `make_mesh`."""
    if not isinstance(mesh, Mesh) or mesh.axis_names != (ROWS, HEADS):
        raise MeshError(f"mesh: expected one of make_mesh, with the axes {ROWS} and {HEADS}, got {mesh!r:.80}")


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
    rows = spec_of(rows_axis(mesh, tokens.shape[0]))
    caches = None if cache is None else cache_specs(cache, mesh)
    run: Callable[..., Any] = jax.shard_map(
        lambda *arrays: tuple(local(arrays[0], tokens=arrays[1], cache=arrays[2], count=arrays[3])),
        mesh=mesh,
        in_specs=(param_specs(params, mesh), rows, caches, rows),
        out_specs=(rows, rows, caches),
        check_vma=False,  # kernels are primitives that it does not know
    )
    logits, hidden, cache = run(params, tokens, cache, count)
    return for_all_processes(mesh, logits), for_all_processes(mesh, hidden), pinned(mesh, cache)


def check_no_probe(probing: bool) -> None:
    """Raises MeshError for a pass on a mesh that is to show its intermediate values."""
    if probing:
        raise MeshError("intermediates: expected a model on one device, got one spread over a mesh")
