"""The files of a model directory: reading JSON and safetensors headers and tensors, and replacing files safely."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llorch_jax import files
from llorch_jax.errors import CheckpointError
from llorch_jax.loading.hf_format import EMBEDDING, HEAD, StoredTensor
from llorch_jax.quantization import DTYPES
from llorch_jax.tokenizer_files import MERGES, SETTINGS, VOCAB, WHOLE

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Names that identify a directory as a model.
MODEL_FILES = (CONFIG, GENERATION_CONFIG, WEIGHTS, INDEX, WHOLE, SETTINGS, VOCAB, MERGES)
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "uint8": "U8"}  # in a safetensors header
_EXPONENTS = {  # the exponent bits of 16-bit dtypes, shifted left by one so that the sign is out of the way
    "bfloat16": np.uint16(0xFF00),
    "float16": np.uint16(0xF800),
}
_CHUNK = 1 << 16  # elements that stay in a core's cache
_PREFIX = "transformer."  # of all names except lm_head.weight, if a file holds the whole language model
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that transformers once stored
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "copy or download it again"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is stored, according to its file's header.

    Attributes:
        path: the file.
        key: the tensor's name in the file.
        shape: as stored.
        code: the safetensors format's name of the dtype, such as F32.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    code: str

    @property
    def dtype(self) -> np.dtype | None:
        """NumPy's dtype, or None if weights cannot have it."""
        return next((dtype for name, dtype in DTYPES.items() if CODES[name] == self.code), None)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)

    @property
    def stored(self) -> int:
        """Size of the tensor in the file, in bytes, for any dtype including codes."""
        return self.nbytes or math.prod(self.shape)


def find_tensors(directory: Path) -> dict[str, Entry]:
    """The tensors of `model.safetensors`, or else of the shards listed in its index; only headers are read.

    Returns:
        name -> entry, names without the `transformer.` prefix and without the causal masks of old files.

    Raises:
        CheckpointError: there are no such files, one is corrupt, the index does not match its shards, or a tensor is
            stored twice.
    """
    promised = _promised_shards(directory)
    found: dict[str, Entry] = {}
    for path in sorted({directory / shard for shard in promised.values()}) or [directory / WEIGHTS]:
        for entry in _read_header(path):
            name = entry.key.removeprefix(_PREFIX)
            if _BUFFERS.fullmatch(name):
                continue
            if name in found:
                places = " and ".join(f"{one.path.name} as {one.key}" for one in (found[name], entry))
                raise CheckpointError(f"{name}: expected to be stored once, got it in {places}; remove one of them")
            found[name] = entry
    held = {(entry.key, entry.path.name) for entry in found.values()}
    for key, shard in promised.items():
        if (key, shard) not in held and not _BUFFERS.fullmatch(key.removeprefix(_PREFIX)):
            raise CheckpointError(f"{key}: expected in {shard}, as {INDEX} says, but it is not there; {_AGAIN}")
    return found


def check_blocks(directory: Path, n_layer: int, entries: dict[str, Entry]) -> None:
    """Raises CheckpointError if there are fewer tensors than blocks, before a description is made of each block."""
    if n_layer > len(entries):
        raise CheckpointError(
            f"{directory}: expected the tensors of n_layer={n_layer} blocks, as {CONFIG} says, "
            f"got {counted(len(entries))}; are both files of one model?"
        )


def check_names(directory: Path, expected: Set[str], stored: Set[str]) -> None:
    """Raises CheckpointError unless exactly the tensors with these names are stored."""
    for kind, names in (("lacks", expected - stored), ("has unexpected", stored - expected)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"{directory}: {kind} {counted(len(names))} ({some}); "
                f"expected the {counted(len(expected))} that {CONFIG} describes"
            )


def counted(count: int) -> str:
    """A number of tensors, for a message."""
    return f"{count:,} tensor{'' if count == 1 else 's'}"


def check_tensors(directory: Path, stored: list[StoredTensor], entries: dict[str, Entry]) -> None:
    """Raises CheckpointError unless exactly these tensors are stored, with these shapes and in floating point."""
    expected = {tensor.name: tensor for tensor in stored}
    check_names(directory, expected.keys(), entries.keys())
    for name, tensor in expected.items():
        entry = entries[name]
        where = f"{name} in {entry.path.name}"
        if entry.shape != tensor.shape:
            shapes = f"expected shape {list(tensor.shape)}, as {CONFIG} describes it, got {list(entry.shape)}"
            raise CheckpointError(f"{where}: {shapes}; are both files of one model?")
        if entry.dtype is None:
            raise CheckpointError(f"{where}: expected {', '.join(DTYPES)}, got {entry.code}; convert it to one of them")


def check_tied(head: Entry, embedding: Entry) -> None:
    """Raises CheckpointError unless an output projection stored by a tied model repeats the embedding."""
    same_form = (head.shape, head.code) == (embedding.shape, embedding.code)
    # Compare bytes, as NaNs differ from each other.
    if same_form and np.array_equal(read_tensor(head).view(np.uint8), read_tensor(embedding).view(np.uint8)):
        return
    raise CheckpointError(
        f"{HEAD} in {head.path.name}: expected a copy of {EMBEDDING}, as {CONFIG} ties them, got other values; "
        f"set tie_word_embeddings to false in {CONFIG} to use it"
    )


def read_tensor(entry: Entry, part: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor's values, copied out of the mapped file.

    The file is mapped again for each call: pages of a mapping count as the process's memory until it is unmapped.

    Args:
        entry: where the tensor is stored.
        part: the part of each axis to read; all of the tensor by default.

    Raises:
        CheckpointError: the file can no longer be read.
    """
    with _opened(entry.path) as file:
        return file.get_slice(entry.key)[part] if part else file.get_tensor(entry.key)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in another floating-point dtype; the same object if it already has that dtype.

    Raises:
        CheckpointError: a value is NaN or infinite, or becomes infinite.
    """
    with np.errstate(all="ignore"):
        result = array.astype(dtype, copy=False)
    if _all_finite(result):
        return result
    finite = np.isfinite(array)
    if finite.all():
        largest = np.abs(array).max()
        raise CheckpointError(f"{name}: expected values that fit {dtype.name}, got {largest:.6g}; use float32")
    place = tuple(int(index) for index in np.argwhere(~finite)[0])
    raise CheckpointError(
        f"{name}: expected finite weights, got {array[place]} at {list(place)}, "
        f"one of {np.count_nonzero(~finite)}; the file is corrupt, or training had diverged"
    )


def _all_finite(array: np.ndarray) -> bool:
    """Whether all values are finite, in one pass without a temporary array of that size."""
    flat = np.ravel(array, order="K")  # a view, even of a transposed array
    if array.dtype == np.float32:
        with np.errstate(all="ignore"):
            # NaN and infinity propagate through a sum of squares. Large values overflow too, so check again.
            return bool(np.isfinite(np.dot(flat, flat))) or bool(np.isfinite(flat).all())
    bits, exponent = flat.view(np.uint16), _EXPONENTS[array.dtype.name]
    chunks = (bits[start : start + _CHUNK] for start in range(0, bits.size, _CHUNK))
    return all((chunk << 1).max() < exponent for chunk in chunks)


def write_tensors(
    path: Path,
    forms: Mapping[str, tuple[tuple[int, ...], str]],
    values: Callable[[str], np.ndarray],
    about: Mapping[str, str],
) -> None:
    """Writes a safetensors file tensor by tensor, without a second copy of all weights.

    Args:
        path: path of the new file.
        forms: name -> shape and dtype, a key of `CODES`, in the order of writing.
        values: called with each name; returns its values in that shape and dtype.
        about: the file's metadata.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for name, (shape, dtype) in forms.items():
        size = DTYPES[dtype].itemsize if dtype in DTYPES else 1
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires aligned data
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in forms:
            np.ascontiguousarray(values(name)).tofile(file)


def check_replaceable(directory: Path, overwrite: bool) -> None:
    """Raises CheckpointError if a directory holds a model that may not be replaced.

    Args:
        directory: the directory to be written.
        overwrite: whether the files of a model in it may be replaced.
    """
    there = [name for name in MODEL_FILES if files.exists(directory / name, CheckpointError)]
    if there and not overwrite:
        raise CheckpointError(
            f"{files.shown(directory)}: expected a directory without a model, got one with {', '.join(there)}; "
            "pass overwrite=True to replace it"
        )


@contextlib.contextmanager
def replacing_files(directory: Path, last: str) -> Iterator[Path]:
    """A folder whose files move into `directory` if the context ends without an error; otherwise nothing changes.

    Args:
        directory: created if necessary. Files with the same names are replaced.
        last: name of the file that moves last, without which a new directory is not a model.

    Raises:
        CheckpointError: the files cannot be written.
    """
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))  # on the same file system, to move files
        try:
            yield folder
            moves = {
                path: directory / path.name for path in sorted(folder.iterdir(), key=lambda path: path.name == last)
            }
            for target in moves.values():  # checked before anything is moved
                if files.exists(target, CheckpointError):
                    files.check_regular(target, CheckpointError, "move it away")
            for path, target in moves.items():
                os.replace(path, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if made:
                with contextlib.suppress(OSError):
                    directory.rmdir()  # only if it is empty
    except OSError as error:
        raise CheckpointError(f"{files.shown(directory)}: cannot be written ({error.strerror or error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    fields = files.read_json(path, CheckpointError, _AGAIN)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {str(fields)[:40]!r}; {_AGAIN}")
    return fields


def _promised_shards(directory: Path) -> dict[str, str]:
    """The shard of each tensor according to the index; empty if there is a single file."""
    if files.exists(directory / WEIGHTS, CheckpointError):
        return {}
    index = directory / INDEX
    if not files.exists(index, CheckpointError):
        raise CheckpointError(_no_weights(directory))
    promised = read_json(index).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise CheckpointError(
            f"{index}: expected a weight_map of tensors and their files, got {promised!r:.80}; {_AGAIN}"
        )
    for shard in promised.values():
        # A path could read any file on the machine.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: expected names of files in its directory, got {shard!r:.80}; {_AGAIN}")
    for shard in sorted(set(promised.values())):
        if not files.exists(directory / shard, CheckpointError):
            raise CheckpointError(f"{directory / shard}: missing, though {INDEX} names it; {_AGAIN}")
    return promised


def _no_weights(directory: Path) -> str:
    expected = f"{directory}: expected {WEIGHTS} or {INDEX}"
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not pickles:
        return f"{expected}, found neither; check the path, or {_AGAIN}"
    return (
        f"{expected}, found only {pickles[0]}, and pickled weights are never loaded because unpickling runs code; "
        "convert them with transformers' save_pretrained(safe_serialization=True)"
    )


def _read_header(path: Path) -> list[Entry]:
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no iterable)
        return [Entry(path, key, tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, mapped for the duration of the context."""
    files.check_regular(path, CheckpointError, _AGAIN)
    with files.explaining(path, CheckpointError, advice=_AGAIN):
        try:
            with safe_open(path, framework="numpy") as file:
                yield file
        except SafetensorError as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            with path.open("rb") as file:
                if file.read(24).startswith(b"version https://git-lfs"):
                    reason = "a git-lfs pointer; run `git lfs pull`"
            raise CheckpointError(f"{path}: expected a whole safetensors file, got none ({reason}); {_AGAIN}") from None
