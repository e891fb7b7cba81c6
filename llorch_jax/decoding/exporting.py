"""What `jax.export` needs to serialize programs of parameters, caches, samplers and decoding states."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import export

from llorch_jax.archive import from_json, to_json
from llorch_jax.decoding import steps
from llorch_jax.decoding.session import SESSION_CLASSES
from llorch_jax.linear import Dense, Norm, QuantizedMatrix
from llorch_jax.params import BlockParams, Params

_CLASSES = (Params, BlockParams, Dense, Norm, QuantizedMatrix, steps.Generated, steps.Alternatives, *SESSION_CLASSES)


@functools.cache
def register_exports() -> None:
    """Registers the pytrees of this package with `jax.export`; a second call changes nothing.

    Programs that take or return parameters, caches, samplers or decoding states can then be serialized, and read back
    in any process that has called it too. It needs the extra `export`. Static fields are written as JSON; a program
    with a value that JSON cannot hold, such as an eviction policy that is a function of your own, raises an ExportError
    when it is serialized.
    """
    for cls in _CLASSES:
        name = f"llorch_jax.{cls.__name__}"
        if issubclass(cls, tuple):
            export.register_namedtuple_serialization(cls, serialized_name=name)
        elif not _is_leaf(cls):
            _register(cls, name)


def _is_leaf(cls: type) -> bool:
    """Whether objects of a class are not pytrees, but values of static fields, such as a codec."""
    return jax.tree_util.all_leaves([object.__new__(cls)])


def _register(cls: Any, name: str) -> None:
    fields = dataclasses.fields(cls)
    arrays = [field.name for field in fields if field.metadata.get("pytree_node", True)]
    static = [field.name for field in fields if field.name not in arrays]

    def to_bytes(values: Any) -> bytes:
        return to_json(dict(zip(static, values, strict=True)), cls.__name__, _CLASSES).encode()

    def from_bytes(data: bytes) -> Any:
        return tuple(from_json(bytes(data).decode(), _CLASSES)[name] for name in static)

    def from_children(aux_data: Any, children: Sequence[Any]) -> Any:
        return cls(**dict(zip(arrays, children, strict=True)), **dict(zip(static, aux_data, strict=True)))

    export.register_pytree_node_serialization(
        cls,
        serialized_name=name,
        serialize_auxdata=to_bytes,
        deserialize_auxdata=from_bytes,
        from_children=from_children,
    )
