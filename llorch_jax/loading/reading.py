"""Reading a model directory in Hugging Face format: its configuration, and its weights in any format."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llorch_jax import files
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CheckpointError, ConfigError, QuantizationError
from llorch_jax.linear import Matrix
from llorch_jax.loading.hf_format import ARCHITECTURES, EMBEDDING, HEAD, StoredTensor, stored_tensors
from llorch_jax.loading.quantized_files import load_quantized, stored_format
from llorch_jax.loading.safetensors_files import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    WEIGHTS,
    Entry,
    cast,
    check_blocks,
    check_tensors,
    check_tied,
    find_tensors,
    read_json,
    read_tensor,
)
from llorch_jax.meshes import HEADS, check_divisible, specs_of
from llorch_jax.params import Params, param_shapes
from llorch_jax.quantization import DTYPES, Codes, Storage, WeightFormat, quantize, quantize_by_rows, quantized_shapes

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], Any]  # called with (bytes read so far, bytes in total)
_FLOAT32 = DTYPES["float32"]


def load_config(directory: PathLike) -> GPT2Config:
    """The configuration in a directory's `config.json`.

    The ids in its `generation_config.json`, if it exists, take precedence over those in `config.json`, as in
    transformers. Nothing else is read from that file: sampling settings are only those passed to `generate`.

    Raises:
        CheckpointError: a file is missing or not JSON.
        ConfigError: it describes an unsupported model.
    """
    path = Path(directory) / CONFIG
    fields = _read_config(path)
    generation = Path(directory) / GENERATION_CONFIG
    ids = read_json(generation) if files.exists(generation, CheckpointError) else {}
    ids = {name: ids[name] for name in ("bos_token_id", "eos_token_id") if ids.get(name) is not None}
    try:
        return GPT2Config.from_hf_dict({**fields, **ids})
    except ConfigError as error:
        blamed = generation if str(error).partition(":")[0] in ids else path
        raise ConfigError(f"{blamed}: {error}") from None


def check_size(directory: PathLike, config: GPT2Config) -> None:
    """Raises CheckpointError if a directory has weights with fewer tensors than the configuration has blocks.

    This protects code that describes a model without loading it, which would not finish for an absurd number of blocks.
    """
    folder = Path(directory)
    if any(files.exists(folder / name, CheckpointError) for name in (WEIGHTS, INDEX)):
        check_blocks(folder, config.n_layer, find_tensors(folder))


def format_in(directory: PathLike) -> WeightFormat | None:
    """The format in which a directory stores its weights; None for Hugging Face's.

    Raises:
        CheckpointError: `config.json` is missing or damaged.
    """
    path = Path(directory) / CONFIG
    return stored_format(_read_config(path), path)


def format_for(stored: WeightFormat | None, weights: Any, group_size: int | None) -> WeightFormat:
    """The format of the weights in memory, given how they are stored.

    Raises:
        QuantizationError: there is no such format, or the weights would be rounded a second time.
    """
    if stored is None:
        return WeightFormat.of("float32" if weights is None else weights, group_size)
    if weights is None and group_size is None:
        return stored
    asked = WeightFormat.of(stored.name if weights is None else weights, group_size)
    same = asked.name == stored.name and group_size in (None, stored.group_size)
    if same:
        return stored
    if asked.arrays == stored.arrays or (asked.name == "float32" and stored.name in DTYPES):
        return asked  # exact
    size = "" if stored.group_size is None else f" in groups of {stored.group_size}"
    raise QuantizationError(
        f"weights: expected {stored.name}{size}, as the model stores them, got {asked.name}; load the float model to "
        "round it differently"
    )


def load_params(
    directory: PathLike,
    config: GPT2Config,
    weights: Any = None,
    group_size: int | None = None,
    *,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """The parameters in a directory's safetensors files, which are named as its `config.json` implies.

    Names, shapes and dtypes of all tensors are checked before any is read. Tensors are read one at a time, the largest
    first, so that peak memory is close to that of the parameters.

    Args:
        directory: holds `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its shards.
        config: the model's hyperparameters.
        weights: the format of the weights in memory, as for `load`; None means as they are stored.
        group_size: as for `load`.
        progress: called repeatedly with the number of bytes read so far and in total.
        mesh: put each parameter on this mesh as it is read, of which a process then holds only what its devices need;
            `in_parts` tells whether that is possible.

    Raises:
        CheckpointError: a file or tensor is missing, unexpected, misshapen, corrupt, not in floating point, or contains
            NaN or infinity.
        QuantizationError: there is no such weight format, or a value is too large for it.
    """
    directory = Path(directory)
    stored_as = format_in(directory)
    form = format_for(stored_as, weights, group_size)
    if stored_as is not None:
        if form.arrays == stored_as.arrays:
            return load_quantized(directory, config, form, progress, mesh)
        return quantize(load_quantized(directory, config, stored_as, progress, mesh), form.name)
    family = _read_family(directory)
    entries = find_tensors(directory)
    check_blocks(directory, config.n_layer, entries)
    tree = stored_tensors(config, family)
    stored: list[tuple[Any, StoredTensor]] = jax.tree.leaves_with_path(tree)
    head = entries.pop(HEAD, None) if config.tie_word_embeddings else None
    check_tensors(directory, [tensor for _, tensor in stored], entries)
    if head is not None:
        check_tied(head, entries[EMBEDDING])
    params: dict[str, Matrix] = {}
    specs = dict(zip((tensor.name for _, tensor in stored), specs_of(tree, mesh), strict=True))
    done = 0
    total = sum(entry.nbytes for entry in entries.values())
    for path, tensor in sorted(stored, key=lambda each: entries[each[1].name].nbytes, reverse=True):
        entry = entries[tensor.name]
        params[tensor.name] = _load_param(tensor, entry, form.storage(path, tensor), specs[tensor.name])
        done += entry.nbytes
        if progress is not None:
            progress(done, total)
    return dataclasses.replace(jax.tree.map(lambda tensor: params[tensor.name], tree), mesh=mesh)


def in_parts(directory: PathLike, config: GPT2Config, weights: Any, group_size: int | None, mesh: Mesh) -> bool:
    """Whether `load_params` can put each parameter on this mesh as it is read.

    Raises:
        MeshError: the mesh does not divide the model.
        QuantizationError: as `load_params`.
    """
    stored = format_in(directory)
    form = format_for(stored, weights, group_size)
    as_stored = form.arrays == stored.arrays if stored is not None else form.name in DTYPES
    if not as_stored:
        return False
    if config.n_head % mesh.shape[HEADS] or config.kv_heads % mesh.shape[HEADS]:
        return False
    shapes = param_shapes(config) if stored is None else quantized_shapes(config, *form)
    check_divisible(config, shapes, mesh.shape[HEADS])
    return True


def _read_config(path: Path) -> dict[str, Any]:
    if not files.exists(path, CheckpointError):
        raise CheckpointError(f"{path}: missing; expected a model directory, with {CONFIG} and weights; check the path")
    return read_json(path)


def _read_family(directory: Path) -> str:
    path = directory / CONFIG
    family = _read_config(path).get("model_type", "gpt2")
    if family not in list(ARCHITECTURES):
        raise ConfigError(f"{path}: model_type: expected one of {', '.join(ARCHITECTURES)}; got {family!r:.80}")
    return family


def _load_param(tensor: StoredTensor, entry: Entry, storage: Storage | None, place: NamedSharding | None) -> Matrix:
    where = f"{tensor.name} in {entry.path.name}"
    if isinstance(storage, Codes):
        return quantize_by_rows(tensor.param_shape, _rows(tensor, entry, where), storage, name=where)
    if place is not None:
        dtype = storage or _FLOAT32
        read = partial(_read_part, tensor, entry, dtype, where)
        return jax.make_array_from_callback(tensor.param_shape, place, read).block_until_ready()
    array = cast(read_tensor(entry), storage or _FLOAT32, where)
    # XLA copies a transposed view faster than NumPy does. Waiting bounds memory to one tensor in flight.
    return jax.device_put(tensor.to_param(array)).block_until_ready()


def _read_part(tensor: StoredTensor, entry: Entry, dtype: np.dtype, where: str, part: tuple[slice, ...]) -> np.ndarray:
    """A part of a parameter; reads only this from the file, unless heads are in another order there."""
    if tensor.heads:
        array = tensor.to_param(read_tensor(entry))[part]
    else:
        array = tensor.to_param(read_tensor(entry, part[::-1] if tensor.transposed else part))
    return cast(np.ascontiguousarray(array), dtype, where)


def _rows(tensor: StoredTensor, entry: Entry, where: str) -> Callable[[int, int], np.ndarray]:
    """A function that returns rows of a parameter in float32, reading only these if they are contiguous in the file."""
    if tensor.transposed or tensor.heads:
        param = tensor.to_param(cast(read_tensor(entry), _FLOAT32, where))
        return lambda start, stop: param[start:stop]
    return lambda start, stop: cast(
        read_tensor(entry, (slice(start, stop),)), _FLOAT32, f"{where}, in the rows from {start}"
    )
