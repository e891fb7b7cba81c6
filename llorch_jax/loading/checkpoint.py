"""Models from directories in Hugging Face's layout, from the hub or from this package; and writing such directories."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llorch_jax import files
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CheckpointError, ConfigError
from llorch_jax.loading import hub
from llorch_jax.loading.hf_format import (
    ARCHITECTURES,
    EMBEDDING,
    HEAD,
    StoredTensor,
    family_of,
    hf_fields,
    stored_tensors,
)
from llorch_jax.loading.safetensors_files import (
    CONFIG,
    DTYPES,
    GENERATION_CONFIG,
    WEIGHTS,
    Entry,
    cast,
    check_blocks,
    check_replaceable,
    check_tensors,
    check_tied,
    find_tensors,
    read_json,
    read_tensor,
    replacing_files,
    write_tensors,
)
from llorch_jax.params import Params
from llorch_jax.tokenizer import Tokenizer

DEMO = "demo"

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], Any]  # is shown (bytes read so far, bytes in all)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model that is ready for use. It is no pytree: jitted functions take `params` and `config`.

    Attributes:
        config: its hyperparameters.
        params: its weights.
        tokenizer: None where the checkpoint has none; token ids go in and out then, but no text.
        name: "demo", a hub id, or the name of its directory.
        directory: where it was read from, or None.
    """

    config: GPT2Config
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = None
    name: str = "unnamed"
    directory: Path | None = None


def load(
    source: PathLike, *, dtype: Any = "float32", revision: str | None = None, progress: Progress | None = None
) -> Model:
    """Loads a model.

    Args:
        source: "demo", the model that comes with this package; or a directory with `config.json` and
            `model.safetensors`; or a hub id such as "openai-community/gpt2", fetched once into the hub's cache.
        dtype: of the parameters in memory: float32, bfloat16 or float16. Computation is in float32.
        revision: branch, tag or commit of a hub repository.
        progress: is called with the bytes read so far and the bytes to read, now and then.

    Raises:
        CheckpointError: there is no such model, or its files are missing, corrupt or do not fit each other.
        ConfigError: `config.json` describes a model that this package does not run.
    """
    dtype = _check_dtype(dtype)  # before a download, not after it
    name, directory = locate(source, revision)
    config = load_config(directory)
    tokenizer = Tokenizer.from_directory(directory)
    return Model(config, load_params(directory, config, dtype, progress=progress), tokenizer, name, directory)


def load_config(directory: PathLike) -> GPT2Config:
    """The configuration in a directory's `config.json`.

    The ids in its `generation_config.json`, where it has one, come before those of `config.json`, as in transformers.
    Of that file nothing else is read: the settings of sampling are those that are passed to `generate`.

    Raises:
        CheckpointError: a file is missing or not JSON.
        ConfigError: it describes a model that this package does not run.
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


def load_params(
    directory: PathLike, config: GPT2Config, dtype: Any = "float32", *, progress: Progress | None = None
) -> Params:
    """The parameters in a directory's safetensors files, whose layout its `config.json` names.

    Names, shapes and dtypes of all tensors are checked before any is read. They are read one at a time, the largest
    first, so that the memory used never exceeds that of the parameters by much.

    Args:
        directory: holds `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its shards.
        config: the model's hyperparameters.
        dtype: of the parameters in memory: float32, bfloat16 or float16.
        progress: is called with the bytes read so far and the bytes to read.

    Raises:
        CheckpointError: a file or tensor is missing, surplus, misshapen, corrupt, not in floating point, or holds NaN
            or infinity.
    """
    dtype = _check_dtype(dtype)
    directory = Path(directory)
    family = _read_family(directory)
    entries = find_tensors(directory)
    check_blocks(directory, config.n_layer, entries)
    tree = stored_tensors(config, family)
    tensors: list[StoredTensor] = jax.tree.leaves(tree)
    head = entries.pop(HEAD, None) if config.tie_word_embeddings else None
    check_tensors(directory, tensors, entries)
    if head is not None:
        check_tied(head, entries[EMBEDDING])
    params: dict[str, jax.Array] = {}
    done, total = 0, sum(entry.nbytes for entry in entries.values())
    for tensor in sorted(tensors, key=lambda tensor: entries[tensor.name].nbytes, reverse=True):
        params[tensor.name] = _load_param(tensor, entries[tensor.name], DTYPES[dtype])
        done += entries[tensor.name].nbytes
        if progress is not None:
            progress(done, total)
    return jax.tree.map(lambda tensor: params[tensor.name], tree)


def save_model(
    directory: PathLike,
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    dtype: Any = "float32",
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model in Hugging Face's layout: configuration, `model.safetensors` and `tokenizer.json`.

    Transformers reads it as gpt2 or, with one key/value head for all query heads, as gpt_bigcode. It has no GPT-2 with
    grouped queries, a sliding window or shared keys and values: such a model is written as "llorch_gpt2", which only
    this package reads.

    The directory is made where there is none. Its files are replaced only once all new ones are complete.

    Args:
        directory: where to write.
        config: the model's hyperparameters.
        params: its weights.
        tokenizer: is written too where given.
        dtype: of the weights in the file: float32, bfloat16 or float16.
        overwrite: replace the files of a model that is in the directory; files that this one does not have stay.

    Raises:
        CheckpointError: the directory holds a model already, parameters and configuration do not fit, a value is not
            finite or does not fit the dtype, or the directory cannot be written.
    """
    dtype = _check_dtype(dtype)
    check_replaceable(Path(directory), overwrite)
    family = family_of(config)
    sources = _match_params(config, stored_tensors(config, family), params)

    def values(name: str) -> np.ndarray:
        tensor, param = sources[name]
        return cast(tensor.from_param(np.asarray(param)), DTYPES[dtype], name)

    # As transformers does: the prefix sets the base model apart from an output projection of its own.
    names = {_stored_name(config, name): name for name in sources}
    shapes = {stored: sources[name][0].shape for stored, name in names.items()}
    with replacing_files(Path(directory), last=CONFIG) as folder:
        write_tensors(folder / WEIGHTS, shapes, dtype, lambda stored: values(names[stored]))
        if tokenizer is not None:
            tokenizer.save(folder)
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        _write_json(folder / GENERATION_CONFIG, {name: id for name, id in ids.items() if id is not None})
        _write_json(folder / CONFIG, hf_fields(config, family, dtype))


def convert(
    source: PathLike,
    directory: PathLike,
    dtype: Any = "float32",
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> None:
    """Writes any model that `load` loads to a directory, as `save_model` does.

    Args:
        source: as for `load`.
        directory: where to write; it may be the source, with `overwrite`.
        dtype: of the weights in the file: float32, bfloat16 or float16.
        revision: branch, tag or commit of a hub repository.
        progress: is called with the bytes read so far and the bytes to read.
        overwrite: replace the files of a model that is in the directory.

    Raises:
        CheckpointError: as `load` and `save_model`.
        ConfigError: as `load`.
    """
    check_replaceable(Path(directory), overwrite)  # before a model is loaded, not after
    model = load(source, dtype=dtype, revision=revision, progress=progress)
    save_model(directory, model.config, model.params, model.tokenizer, dtype, overwrite=overwrite)


def locate(source: PathLike, revision: str | None = None) -> tuple[str, Path]:
    """Name and directory of what `load` was asked for."""
    if source == DEMO:
        folder = Path(__file__).parents[1] / "assets" / DEMO
        if not (folder / CONFIG).exists():
            raise CheckpointError(f"{DEMO}: this installation lacks the model, expected in {folder}; install it again")
        return DEMO, folder
    expected = (
        f"source: expected {DEMO!r}, a directory with {CONFIG} and {WEIGHTS}, or a hub id such as openai-community/gpt2"
    )
    if not isinstance(source, str | os.PathLike) or isinstance(os.fspath(source), bytes):
        raise CheckpointError(f"{expected}; got {type(source).__name__}")
    path = Path(source)
    with files.explaining(source, CheckpointError):
        if os.fspath(source) and path.is_dir():
            if revision is not None:
                raise CheckpointError(f"revision: only hub models have one, but {source} is a directory; leave it out")
            return path.resolve().name, path
        found = "a file" if files.exists(source, CheckpointError) else "no such directory"
    if hub.is_repo_id(source) and found != "a file":
        return str(source), hub.download(str(source), revision)
    raise CheckpointError(f"{expected}; {files.shown(source)!r} is {found}")


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


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _check_dtype(dtype: Any) -> str:
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = ""
    if dtype is None or name not in DTYPES:
        raise CheckpointError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r:.80}")
    return name


def _load_param(tensor: StoredTensor, entry: Entry, dtype: np.dtype) -> jax.Array:
    array = cast(read_tensor(entry), dtype, f"{tensor.name} in {entry.path.name}")
    # XLA copies a transposed view faster than NumPy does. Waiting bounds memory to one tensor in flight.
    return jax.device_put(tensor.to_param(array)).block_until_ready()


def _match_params(config: GPT2Config, tree: Params, params: Params) -> dict[str, tuple[StoredTensor, jax.Array]]:
    """Each stored tensor's parameter, by name."""
    expected, given = jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(params)
    if [path for path, _ in expected] != [path for path, _ in given]:
        raise CheckpointError(
            f"params: expected a model's with n_layer={config.n_layer} and "
            f"tie_word_embeddings={config.tie_word_embeddings}, got another tree; pass the params that belong to config"
        )
    matched = {}
    for (_, tensor), (_, param) in zip(expected, given, strict=True):
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        if param.shape != shape:
            raise CheckpointError(
                f"params: expected shape {list(shape)} for {tensor.name}, got {list(param.shape)}; "
                "pass the params that belong to config"
            )
        matched[tensor.name] = tensor, param
    return matched


def _stored_name(config: GPT2Config, name: str) -> str:
    return name if config.tie_word_embeddings or name == HEAD else f"transformer.{name}"
