"""Arrays, tuples and dataclasses in one safetensors file: written atomically, refused if damaged or unexpected."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llorch_jax.errors import ExportError, LlorchError
from llorch_jax.files import check_regular, explaining, parse_json, replace_file, shown

FORMAT = "llorch_jax archive 1"
_DTYPES = {"bool": np.bool_, "bfloat16": jnp.bfloat16, "float16": np.float16, "float32": np.float32} | {
    f"{kind}{bits}": np.dtype(f"{kind}{bits}").type for kind in ("int", "uint") for bits in (8, 16, 32)
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one kind of archive holds.

    Attributes:
        name: for messages, such as "cache".
        value: class of the whole value.
        classes: dataclasses and named tuples that may occur in it.
        error: class of the errors.
        check: called with a value that was read; raises an LlorchError unless its fields are consistent.
    """

    name: str
    value: type
    classes: tuple[type, ...]
    error: type[LlorchError]
    check: Callable[[Any], None]


def write_archive(path: Path, value: Any, kind: Kind, fingerprint: str) -> None:
    """Writes a value to a file atomically: an existing file is replaced only by a complete one.

    Args:
        path: of the file.
        value: made of the kind's classes, arrays, random keys, tuples, dicts, numbers, texts and None.
        kind: what the archive holds.
        fingerprint: of the model to which the value belongs; may be empty.

    Raises:
        kind.error: the value holds something else, or the file cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    try:
        content = _describe(value, "", tensors, {cls.__name__ for cls in kind.classes})
    except _Unexpected as unexpected:
        raise kind.error(f"{kind.name}: {unexpected}") from None
    about = json.dumps({"format": FORMAT, "content": content, "fingerprint": fingerprint}, sort_keys=True)
    data = save(tensors, {"about": about, "sha256": _checksum(about, tensors)})
    replace_file(path, lambda file: file.write(data), kind.error)


def read_archive(path: Path, kind: Kind, fingerprint: str | None) -> Any:
    """The value that `write_archive` wrote.

    Every field of every object is checked against the type that its class declares, then the whole by `kind.check`.

    Args:
        path: of the file.
        kind: what the archive should hold.
        fingerprint: expected fingerprint; None does not compare.

    Raises:
        kind.error: the file is missing, truncated, corrupt, of another format, or of another model.
    """
    about, checksum, tensors = _read(path, kind)
    name, what = shown(path), kind.name
    if checksum != _checksum(about, tensors):
        raise kind.error(f"{name}: expected the checksum of its contents, got another: no {what}, or it is corrupt")
    try:
        content, stored = _parse(about)
    except _Unexpected as unexpected:
        raise kind.error(f"{name}: expected a {what} of this version, got something else ({unexpected})") from None
    if fingerprint is not None and stored != fingerprint:
        raise kind.error(
            f"{name}: expected a {what} of the model with fingerprint {fingerprint or 'none'}, "
            f"got one of {stored or 'none'}; prefill the text again"
        )
    try:
        value = _build(content, tensors, {cls.__name__: cls for cls in kind.classes})
        if not isinstance(value, kind.value):
            raise _Unexpected(f"expected a {what}, got {_brief(value)}")
        kind.check(value)
    except (_Unexpected, LlorchError, RecursionError) as unexpected:
        reason = "nested too deeply" if isinstance(unexpected, RecursionError) else unexpected
        raise kind.error(f"{name}: expected a {what} of this version, got something else ({reason})") from None
    return value


def to_json(value: Any, name: str, classes: Sequence[type]) -> str:
    """A value without arrays as JSON.

    Args:
        value: made of these classes, tuples, dicts, numbers, texts and None.
        name: of the value, for messages.
        classes: dataclasses and named tuples that may occur in it.

    Raises:
        ExportError: the value holds something else.
    """
    try:
        content = _describe(value, name, {}, {cls.__name__ for cls in classes})
    except _Unexpected as unexpected:
        raise ExportError(str(unexpected)) from None
    return json.dumps(content)


def from_json(text: str, classes: Sequence[type]) -> Any:
    """The inverse of `to_json`.

    Raises:
        ExportError: the text is something else, or was written by another version.
    """
    try:
        return _build(parse_json(text), {}, {cls.__name__: cls for cls in classes})
    except (_Unexpected, ValueError) as unexpected:
        raise ExportError(f"expected values of this version, got something else ({unexpected})") from None


class _Unexpected(Exception):
    """A value that an archive cannot hold, or a description that matches none of its classes."""


def _parse(about: str) -> tuple[Any, str]:
    """Content and fingerprint of an archive's metadata."""
    try:
        fields = parse_json(about)
    except ValueError as failure:
        raise _Unexpected(failure) from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        got = fields.get("format") if isinstance(fields, dict) else fields
        raise _Unexpected(f"expected the format {FORMAT!r}, got {got!r:.80}")
    if fields.keys() != {"format", "content", "fingerprint"} or not isinstance(fields["fingerprint"], str):
        raise _Unexpected(f"expected format, content and fingerprint, got {sorted(fields)!r:.80}")
    return fields["content"], fields["fingerprint"]


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
        raise _Unexpected(f"expected arrays, numbers or one of {', '.join(sorted(known))} to save as "
                          f"{name.lstrip('.')}, got {value!r:.80}")  # fmt: skip
    return {"value": value}


def _build(description: Any, tensors: dict[str, np.ndarray], classes: dict[str, Any]) -> Any:
    """The inverse of `_describe`."""
    match description:
        case {"value": value, **rest} if not rest and isinstance(value, bool | int | float | str | None):
            return value
        case {"tensor": str(name), "dtype": str(dtype), "shape": list(shape), **rest} if not rest:
            return _build_array(tensors, name, dtype, shape)
        case {"keys": keys, "impl": str(impl), **rest} if not rest:
            return _build_keys(_build(keys, tensors, classes), impl)
        case {"tuple": str(kind), "items": list(items), **rest} if not rest:
            built = [_build(item, tensors, classes) for item in items]
            return tuple(built) if kind == "tuple" else _build_object(kind, _positional(kind, built, classes), classes)
        case {"object": str(kind), "fields": dict(fields), **rest} if not rest:
            return _build_object(kind, {name: _build(each, tensors, classes) for name, each in fields.items()}, classes)
        case {"dict": dict(items), **rest} if not rest:
            return {key: _build(item, tensors, classes) for key, item in items.items()}
    raise _Unexpected(f"expected the description of a value, got {description!r:.80}")


def _build_array(tensors: dict[str, np.ndarray], name: str, dtype: str, shape: list[Any]) -> jax.Array:
    data = tensors.get(name)
    sizes_fit = all(type(size) is int and size >= 0 for size in shape)
    if data is None or data.dtype != np.uint8 or dtype not in _DTYPES or not sizes_fit:
        raise _Unexpected(f"{name:.80}: expected a stored array of a known dtype, got {dtype:.20} {shape!r:.80}")
    stored = np.dtype(_DTYPES[dtype])
    if data.ndim != 1 or data.size != math.prod(shape) * stored.itemsize:
        raise _Unexpected(f"{name:.80}: expected the bytes of {dtype} {shape!r:.80}, got {data.size}")
    if dtype == "bool" and data.size and data.max() > 1:
        raise _Unexpected(f"{name:.80}: expected false or true, got {data.max()}")
    return jax.device_put(data.view(stored).reshape(shape).copy())


def _build_keys(data: Any, impl: str) -> jax.Array:
    try:
        return jax.random.wrap_key_data(data, impl=impl)
    except (TypeError, ValueError, AttributeError):
        raise _Unexpected(f"expected the data of random keys, got those of {impl:.40}") from None


def _positional(kind: str, items: list[Any], classes: dict[str, Any]) -> dict[str, Any]:
    """The items of a named tuple, or of a class that once was one, by field name."""
    names = _names(classes[kind]) if kind in classes else []
    if len(names) != len(items):
        raise _Unexpected(f"{kind:.40}: expected {len(names)} fields, got {len(items)}")
    return dict(zip(names, items, strict=True))


def _build_object(kind: str, fields: dict[str, Any], classes: dict[str, Any]) -> Any:
    """An object of a known class, made from exactly its fields, each of the type that the class declares."""
    if kind not in classes:
        raise _Unexpected(f"expected one of {', '.join(classes)}; got {kind!r:.40}")
    cls = classes[kind]
    hints = typing.get_type_hints(cls)
    names = _names(cls)
    if upgrade := getattr(cls, "upgraded", None):  # a class that had other fields in earlier versions
        fields = upgrade(fields)
    if set(fields) != set(names):
        raise _Unexpected(f"{kind}: expected the fields {', '.join(names)}; got {', '.join(sorted(fields))!r:.80}")
    for name in names:
        if not _fits(fields[name], hints[name]):
            expected = getattr(hints[name], "__name__", str(hints[name]))
            raise _Unexpected(f"{kind}.{name}: expected {expected}, got {_brief(fields[name])}")
    return cls(**fields)


def _names(cls: type) -> list[str]:
    """The names of the fields of a dataclass or a named tuple."""
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(cls._fields)  # type: ignore[attr-defined]


def _brief(value: Any) -> str:
    """A value for a message: arrays and their containers are shown by class name."""
    return f"{value!r:.80}" if isinstance(value, bool | int | float | str | None) else type(value).__name__


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that a field declares."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is ...:
            return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is typing.Literal:
        return value in arguments
    hint = origin or hint
    if hint in (int, float):  # a bool is an int to isinstance, and an int will do for a float
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if getattr(hint, "_is_protocol", False):
        return dataclasses.is_dataclass(value)
    says_nothing = hint is Any or not isinstance(hint, type)  # as a type variable does
    return says_nothing or isinstance(value, hint)


def _checksum(about: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: Path, kind: Kind) -> tuple[str, str, dict[str, np.ndarray]]:
    """The description, the checksum stated in the file, and the arrays."""
    name, what, error = shown(path), kind.name, kind.error
    check_regular(path, error)
    with explaining(path, error):
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if not {"about", "sha256"} <= metadata.keys():  # found before a model's weights are read
                    raise error(f"{name}: expected a saved {what}, got a safetensors file of another kind")
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
                return metadata["about"], metadata["sha256"], tensors
        except SafetensorError as failure:
            raise error(f"{name}: expected a saved {what}, got another file ({failure})") from None
