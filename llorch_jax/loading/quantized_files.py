"""Model directories whose weights are stored in low precision: every array of `Params` as it is in memory.

`config.json` names the format and a family that other programs do not know; the tensors in `model.safetensors` are
named after the parameters, such as `blocks.0.qkv.weight.codes`. A tied embedding is stored once.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llorch_jax.config import GPT2Config
from llorch_jax.errors import CheckpointError, QuantizationError
from llorch_jax.linear import QuantizedMatrix
from llorch_jax.loading.hf_format import hf_fields
from llorch_jax.loading.safetensors_files import (
    CODES,
    CONFIG,
    WEIGHTS,
    Entry,
    cast,
    check_blocks,
    check_names,
    find_tensors,
    read_tensor,
    write_tensors,
)
from llorch_jax.meshes import specs_of
from llorch_jax.params import Params
from llorch_jax.quantization import DTYPES, WeightFormat, quantized_shapes

FIELD = "_llorch_weights"  # in config.json; names that begin with an underscore are not settings of a model
Progress = Callable[[int, int], Any]


def stored_format(fields: dict[str, Any], path: Path) -> WeightFormat | None:
    """The format that a `config.json` names; None for a directory in Hugging Face format.

    Raises:
        CheckpointError: it names a format that does not exist.
    """
    given = fields.get(FIELD)
    if given is None:
        return None
    try:
        return WeightFormat.of(given["format"], given["group_size"])
    except (QuantizationError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {FIELD}: expected a format and group_size, got {given!r:.80} ({error})"
        ) from None


def format_of(config: GPT2Config, params: Params) -> WeightFormat:
    """The format of parameters.

    Raises:
        QuantizationError: it is not one that `quantize` makes for this configuration.
    """
    matrix = params.blocks[0].qkv.weight
    if isinstance(matrix, QuantizedMatrix):
        name, group_size = "w8a8" if matrix.x_bits == 8 else f"int{matrix.bits}", matrix.group_size
    else:
        name, group_size = matrix.dtype.name, None
    form = WeightFormat.of(name, group_size)
    given, expected = (
        ({name: (leaf.shape, leaf.dtype.name) for name, leaf in _named(tree).items()}, jax.tree.structure(tree))
        for tree in (dataclasses.replace(params, mesh=None), quantized_shapes(config, *form))
    )
    if given != expected:
        raise QuantizationError(
            f"params: expected all of a model as `quantize` makes them in {name}, got others; "
            "pass the params that belong to config"
        )
    return form


def write_quantized(folder: Path, config: GPT2Config, params: Params) -> dict[str, Any]:
    """Writes the weights into a folder, and returns the fields of their `config.json`.

    Raises:
        QuantizationError: the format of the parameters is unknown.
    """
    form = format_of(config, params)
    leaves = _named(params)
    forms = {name: (leaf.shape, leaf.dtype.name) for name, leaf in leaves.items()}
    write_tensors(folder / WEIGHTS, forms, lambda name: np.asarray(leaves[name]), {"format": "llorch_jax"})
    return {**hf_fields(config, "llorch_gpt2", "float32"), FIELD: {"format": form.name, "group_size": form.group_size}}


def load_quantized(
    directory: Path, config: GPT2Config, form: WeightFormat, progress: Progress | None, mesh: Mesh | None = None
) -> Params:
    """The parameters in a directory of this format; each array is copied once, out of the mapped file.

    On a mesh, every device's part of it is.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen, has another dtype, or is not finite.
    """
    entries = find_tensors(directory)
    check_blocks(directory, config.n_layer, entries)
    shapes = quantized_shapes(config, *form)
    expected = _named(shapes)
    check_names(directory, expected.keys(), entries.keys())
    for name, leaf in expected.items():
        entry = entries[name]
        if (entry.shape, entry.code) != (leaf.shape, CODES[leaf.dtype.name]):
            raise CheckpointError(
                f"{name} in {entry.path.name}: expected {CODES[leaf.dtype.name]} {list(leaf.shape)}, as {CONFIG} "
                f"describes it, got {entry.code} {list(entry.shape)}; are both files of one model?"
            )
    done, total = 0, sum(entries[name].stored for name in expected)
    loaded: dict[str, jax.Array] = {}
    specs = dict(zip(expected, specs_of(shapes, mesh), strict=True))
    for name in sorted(expected, key=lambda name: entries[name].stored, reverse=True):
        loaded[name] = _load(name, entries[name], specs[name])
        done += entries[name].stored
        if progress is not None:
            progress(done, total)
    params: Params = jax.tree.unflatten(jax.tree.structure(shapes), [loaded[name] for name in expected])
    return dataclasses.replace(params, mesh=mesh)


def _load(name: str, entry: Entry, place: NamedSharding | None) -> jax.Array:
    def read(part: tuple[slice, ...] | None) -> np.ndarray:
        array = read_tensor(entry, part or ())
        if array.dtype.name not in DTYPES:
            return array
        return cast(array, array.dtype, f"{name} in {entry.path.name}")  # checks that all values are finite

    if place is None:
        return jax.device_put(read(None)).block_until_ready()
    return jax.make_array_from_callback(entry.shape, place, read).block_until_ready()


def _named(params: Params) -> dict[str, Any]:
    """The arrays by their names, in the order of the tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
