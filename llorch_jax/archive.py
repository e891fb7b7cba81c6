"""Arrays, tuples and dataclasses in one safetensors file: written atomically, refused where damaged or unexpected."""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llorch_jax.errors import CacheError

FORMAT = "llorch_jax archive 1"


def write_archive(path: Path, value: Any, classes: Sequence[type], fingerprint: str) -> None:
    """Writes a dataclass; the file appears whole or not at all, and one that stood there before stays until then.

    Args:
        path: of the file.
        value: made of the classes, arrays, random keys, tuples, numbers, texts and None.
        classes: dataclasses and named tuples that may occur.
        fingerprint: of the model that the value belongs to; may be empty.

    Raises:
        CacheError: the value holds something else, or the file cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    content = _describe(value, "", tensors, {cls.__name__ for cls in classes})
    about = json.dumps({"format": FORMAT, "content": content, "fingerprint": fingerprint}, sort_keys=True)
    _write_atomically(path, save(tensors, {"about": about, "sha256": _checksum(about, tensors)}))


def read_archive(path: Path, classes: Sequence[type], fingerprint: str | None, what: str) -> Any:
    """What `write_archive` wrote.

    Args:
        path: of the file.
        classes: that may occur; the first of them that fits the content's name is made.
        fingerprint: to compare; None does not.
        what: it should be, for messages, as "cache".

    Raises:
        CacheError: the file is missing, truncated, corrupt, of another format, or of another model.
    """
    metadata, tensors = _read(path, what)
    if "about" not in metadata or metadata.get("sha256") != _checksum(metadata["about"], tensors):
        raise CacheError(f"{path}: expected the checksum of its contents, got another: no {what}, or it is corrupt")
    about = json.loads(metadata["about"])
    if about["format"] != FORMAT:
        raise CacheError(f"{path}: expected the format {FORMAT!r}, got {about['format']!r}")
    if fingerprint is not None and about["fingerprint"] != fingerprint:
        raise CacheError(
            f"{path}: expected a {what} of the model with fingerprint {fingerprint or 'none'}, "
            f"got one of {about['fingerprint'] or 'none'}; prefill the text again"
        )
    try:
        return _build(about["content"], tensors, {cls.__name__: cls for cls in classes})
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path}: expected a {what} of this version, got something else ({error})") from None


def _describe(value: Any, name: str, tensors: dict[str, np.ndarray], known: set[str]) -> Any:
    """A value as JSON, its arrays put into `tensors` under names that start with `name`."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _describe(jax.random.key_data(value), name, tensors, known)
        return {"keys": data, "impl": str(jax.random.key_impl(value))}
    if isinstance(value, jax.Array):
        array = np.asarray(value)
        tensors[name] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # safe for every dtype
        return {"tensor": name, "dtype": str(array.dtype), "shape": list(array.shape)}
    kind = type(value).__name__
    if isinstance(value, tuple) and (type(value) is tuple or kind in known):
        items = [_describe(item, f"{name}.{number}", tensors, known) for number, item in enumerate(value)]
        return {"tuple": kind, "items": items}
    if dataclasses.is_dataclass(value) and kind in known:
        names = [field.name for field in dataclasses.fields(value)]
        fields = {each: _describe(getattr(value, each), f"{name}.{each}", tensors, known) for each in names}
        return {"object": kind, "fields": fields}
    if isinstance(value, dict):
        return {"dict": {key: _describe(item, f"{name}.{key}", tensors, known) for key, item in value.items()}}
    if not isinstance(value, bool | int | float | str | None):
        raise CacheError(f"{name.lstrip('.')}: expected arrays, numbers or one of {', '.join(sorted(known))} to save, "
                         f"got {value!r:.80}")  # fmt: skip
    return {"value": value}


def _build(description: Any, tensors: dict[str, np.ndarray], classes: dict[str, Any]) -> Any:
    """The opposite of `_describe`."""
    if "keys" in description:
        data = _build(description["keys"], tensors, classes)
        return jax.random.wrap_key_data(data, impl=description["impl"])
    if "tensor" in description:
        array = tensors[description["tensor"]].view(jnp.dtype(description["dtype"]))
        return jax.device_put(array.reshape(description["shape"]).copy())
    if "tuple" in description:
        items = [_build(item, tensors, classes) for item in description["items"]]
        return tuple(items) if description["tuple"] == "tuple" else classes[description["tuple"]](*items)
    if "dict" in description:
        return {key: _build(item, tensors, classes) for key, item in description["dict"].items()}
    if "object" in description:
        fields = {name: _build(each, tensors, classes) for name, each in description["fields"].items()}
        return classes[description["object"]](**fields)
    return description["value"]


def _checksum(about: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].data)
    return digest.hexdigest()


def _read(path: Path, what: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: expected a file that save_{what} wrote ({error})") from None


def _write_atomically(path: Path, content: bytes) -> None:
    partial_file = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with open(partial_file, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_file, path)
    except OSError as error:
        raise CacheError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        partial_file.unlink(missing_ok=True)
