"""Loading models from directories in Hugging Face format, from the hub or from this package; saving directories."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llorch_jax import files
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CheckpointError
from llorch_jax.loading import hub
from llorch_jax.loading.gguf_files import SUFFIX, load_gguf
from llorch_jax.loading.gguf_tokenizer import tokenizer_in
from llorch_jax.loading.hf_format import (
    HEAD,
    StoredTensor,
    family_of,
    hf_fields,
    stored_tensors,
)
from llorch_jax.loading.quantized_files import write_quantized
from llorch_jax.loading.reading import Progress, in_parts, load_config, load_params
from llorch_jax.loading.safetensors_files import (
    CONFIG,
    GENERATION_CONFIG,
    WEIGHTS,
    cast,
    check_replaceable,
    replacing_files,
    write_tensors,
)
from llorch_jax.params import Params
from llorch_jax.quantization import DTYPES, WeightFormat, check_float
from llorch_jax.sharding import check_mesh, shard
from llorch_jax.tokenizer import Tokenizer

DEMO = "demo"

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model. It is not a pytree: jitted functions take `params` and `config`.

    Attributes:
        config: its hyperparameters.
        params: its weights.
        tokenizer: None if the checkpoint has none; such a model takes and returns token ids, but no text.
        name: "demo", a hub id, or the name of its directory.
        directory: the directory from which it was loaded; None for a GGUF file, and for a model made otherwise.
    """

    config: GPT2Config
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = None
    name: str = "unnamed"
    directory: Path | None = None


def load(
    source: PathLike,
    *,
    weights: Any = None,
    group_size: int | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a model.

    Args:
        source: "demo", the model bundled with this package; or a directory with `config.json` and
            `model.safetensors`; or a GGUF file; or a hub id such as "openai-community/gpt2", downloaded once into the
            hub's cache.
        weights: the format of the weights in memory: "float32", "bfloat16", "float16", "int8", "w8a8" or "int4"; see
            `quantize`. None keeps the format of GGUF files and of directories that `quantize_model` wrote, and is
            float32 for all others. Computation is in float32.
        group_size: number of columns that share a scale, for int8 and int4; None for the format's default.
        revision: branch, tag or commit of a hub repository.
        progress: called repeatedly with the number of bytes read so far and in total.
        mesh: from `make_mesh`, to spread the model over as `shard` does. Where the weights are stored in the format
            asked for, and there are as many key/value heads as devices at least, each process reads only what its
            devices need; otherwise all, and spreads it then.

    Raises:
        CheckpointError: there is no such model, or its files are missing, corrupt or inconsistent.
        ConfigError: `config.json` describes an unsupported model.
        MeshError: as for `shard`.
        QuantizationError: there is no such weight format, or the weights do not fit it or are stored in another one.
    """
    if mesh is not None:
        check_mesh(mesh)
    if weights is not None:
        WeightFormat.of(weights, group_size)  # before a possible download
    name, directory = locate(source, revision)
    if directory.suffix == SUFFIX and not directory.is_dir():
        file, config, params = load_gguf(directory, weights, group_size, progress)
        model = Model(config, params, tokenizer_in(file), name)
        return model if mesh is None else shard(model, mesh)
    config = load_config(directory)
    tokenizer = Tokenizer.from_directory(directory)
    parts = mesh if mesh is not None and in_parts(directory, config, weights, group_size, mesh) else None
    params = load_params(directory, config, weights, group_size, progress=progress, mesh=parts)
    model = Model(config, params, tokenizer, name, directory)
    return model if mesh is None or mesh is parts else shard(model, mesh)


def save_model(
    directory: PathLike,
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    dtype: Any = "float32",
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model in Hugging Face format: configuration, `model.safetensors` and `tokenizer.json`.

    Transformers reads it as gpt2 or, with one key/value head for all query heads, as gpt_bigcode. It does not support
    GPT-2 with grouped queries, a sliding window or shared keys and values: such a model is written as "llorch_gpt2",
    which only this package reads.

    The directory is created if necessary. Its files are replaced only once all new ones are complete.

    Args:
        directory: the directory to write.
        config: the model's hyperparameters.
        params: its weights.
        tokenizer: the tokenizer to write, if any.
        dtype: dtype of the weights in the file: float32, bfloat16 or float16.
        overwrite: replace the files of a model in the directory; other files of that model are kept.

    Raises:
        CheckpointError: the directory already holds a model, parameters and configuration do not match, a value is not
            finite or does not fit the dtype, or the directory cannot be written.
        QuantizationError: the parameters are quantized.
    """
    dtype = _check_dtype(dtype)
    check_replaceable(Path(directory), overwrite)
    family = family_of(config)
    sources = _match_params(config, stored_tensors(config, family), params)

    def values(name: str) -> np.ndarray:
        tensor, param = sources[name]
        return cast(tensor.from_param(np.asarray(param)), DTYPES[dtype], name)

    # As in transformers: the prefix separates the base model from an untied output projection.
    names = {_stored_name(config, name): name for name in sources}
    forms = {stored: (sources[name][0].shape, dtype) for stored, name in names.items()}
    with replacing_files(Path(directory), last=CONFIG) as folder:
        # Transformers refuses files without this format.
        write_tensors(folder / WEIGHTS, forms, lambda stored: values(names[stored]), {"format": "pt"})
        _write_rest(folder, config, tokenizer, hf_fields(config, family, dtype))


def save_quantized(
    directory: PathLike,
    config: GPT2Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model with its weights as they are in memory, in any of the formats of `quantize`.

    `load` reads such a directory without rounding anything again. Only this package reads it: for others, write float
    weights with `save_model`.

    Args:
        directory: the directory to write, as for `save_model`.
        config: the model's hyperparameters.
        params: its weights.
        tokenizer: the tokenizer to write, if any.
        overwrite: replace the files of a model in the directory; other files of that model are kept.

    Raises:
        CheckpointError: the directory already holds a model, or cannot be written.
        QuantizationError: the parameters do not match the configuration, or are in several formats.
    """
    check_replaceable(Path(directory), overwrite)
    with replacing_files(Path(directory), last=CONFIG) as folder:
        _write_rest(folder, config, tokenizer, write_quantized(folder, config, params))


def quantize_model(
    source: PathLike,
    directory: PathLike,
    weights: str,
    group_size: int | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> None:
    """Writes any model that `load` loads to a directory, with its weights in another format.

    Args:
        source: as for `load`.
        directory: the directory to write; it may be the source, with `overwrite`.
        weights: "bfloat16", "float16", "int8", "w8a8" or "int4"; see `quantize`.
        group_size: columns that share a scale, for int8 and int4; None for the format's default.
        revision: branch, tag or commit of a hub repository.
        progress: called repeatedly with the number of bytes read so far and in total.
        overwrite: replace the files of a model in the directory.

    Raises:
        CheckpointError: as `load` and `save_quantized`.
        ConfigError: as `load`.
        QuantizationError: as `load`.
    """
    WeightFormat.of(weights, group_size)
    check_replaceable(Path(directory), overwrite)
    model = load(source, weights=weights, group_size=group_size, revision=revision, progress=progress)
    save_quantized(directory, model.config, model.params, model.tokenizer, overwrite=overwrite)


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
        directory: the directory to write; it may be the source, with `overwrite`.
        dtype: dtype of the weights in the file: float32, bfloat16 or float16.
        revision: branch, tag or commit of a hub repository.
        progress: called repeatedly with the number of bytes read so far and in total.
        overwrite: replace the files of a model in the directory.

    Raises:
        CheckpointError: as `load` and `save_model`.
        ConfigError: as `load`.
    """
    dtype = _check_dtype(dtype)  # before loading
    check_replaceable(Path(directory), overwrite)
    model = load(source, weights=dtype, revision=revision, progress=progress)
    save_model(directory, model.config, model.params, model.tokenizer, dtype, overwrite=overwrite)


def locate(source: PathLike, revision: str | None = None) -> tuple[str, Path]:
    """The name of the model that `load` is to load, and its directory or GGUF file."""
    if source == DEMO:
        folder = Path(__file__).parents[1] / "assets" / DEMO
        if not (folder / CONFIG).exists():
            raise CheckpointError(f"{DEMO}: this installation lacks the model, expected in {folder}; install it again")
        return DEMO, folder
    expected = (
        f"source: expected {DEMO!r}, a directory with {CONFIG} and {WEIGHTS}, a GGUF file, or a hub id such as "
        "openai-community/gpt2"
    )
    if not isinstance(source, str | os.PathLike) or isinstance(os.fspath(source), bytes):
        raise CheckpointError(f"{expected}; got {type(source).__name__}")
    path = Path(source)
    with files.explaining(source, CheckpointError):
        if os.fspath(source) and path.is_dir():
            if revision is not None:
                raise CheckpointError(f"revision: only hub models have one, but {source} is a directory; leave it out")
            return path.resolve().name, path
        if path.suffix == SUFFIX and path.is_file():
            if revision is not None:
                raise CheckpointError(f"revision: only hub models have one, but {source} is a file; leave it out")
            return path.stem, path
        found = "a file" if files.exists(source, CheckpointError) else "no such directory"
    if hub.is_repo_id(source) and found != "a file":
        return str(source), hub.download(str(source), revision)
    raise CheckpointError(f"{expected}; {files.shown(source)!r} is {found}")


def _write_rest(folder: Path, config: GPT2Config, tokenizer: Tokenizer | None, fields: dict[str, Any]) -> None:
    """Writes the other files of a model's directory, besides the weights; `fields` are those of `config.json`."""
    if tokenizer is not None:
        tokenizer.save(folder)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(folder / GENERATION_CONFIG, {name: id for name, id in ids.items() if id is not None})
    _write_json(folder / CONFIG, fields)


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


def _match_params(config: GPT2Config, tree: Params, params: Params) -> dict[str, tuple[StoredTensor, jax.Array]]:
    """Each stored tensor with its parameter, by name."""
    check_float(
        params, "Hugging Face's layout has no such weights; use save_quantized, or save the model's float weights"
    )
    expected, given = jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(params)
    if [path for path, _ in expected] != [path for path, _ in given]:
        raise CheckpointError(
            f"params: expected a model's with n_layer={config.n_layer} and "
            f"tie_word_embeddings={config.tie_word_embeddings}, got another tree; pass the params that belong to config"
        )
    matched = {}
    for (_, tensor), (_, param) in zip(expected, given, strict=True):
        shape = tensor.param_shape
        if param.shape != shape:
            raise CheckpointError(
                f"params: expected shape {list(shape)} for {tensor.name}, got {list(param.shape)}; "
                "pass the params that belong to config"
            )
        matched[tensor.name] = tensor, param
    return matched


def _stored_name(config: GPT2Config, name: str) -> str:
    return name if config.tie_word_embeddings or name == HEAD else f"transformer.{name}"
