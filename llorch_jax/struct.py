"""Immutable dataclasses that are pytrees.

The interface is that of `flax.struct`, so its documentation applies; importing that package takes a quarter of the time
of importing JAX, and installs a dozen others.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform, overload

import jax

Class = TypeVar("Class", bound=type)


def field(*, pytree_node: bool = True, metadata: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """A field of a dataclass: arrays or trees of them, or with `pytree_node=False` a hashable, static value."""
    return dataclasses.field(metadata={**(metadata or {}), "pytree_node": pytree_node}, **settings)


@overload
def dataclass(cls: Class, /) -> Class: ...


@overload
def dataclass(**settings: Any) -> Callable[[Class], Class]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(cls: Any = None, /, **settings: Any) -> Any:
    """Makes a class a frozen dataclass with a method `replace`, and a node of pytrees."""
    if cls is None:
        return lambda cls: _register(cls, settings)
    return _register(cls, settings)


def _register(cls: Any, settings: Mapping[str, Any]) -> Any:
    made = dataclasses.dataclass(frozen=True, **settings)(cls)
    arrays = [item.name for item in dataclasses.fields(made) if item.metadata.get("pytree_node", True)]
    static = [item.name for item in dataclasses.fields(made) if item.name not in arrays]
    made.replace = _replace
    return jax.tree_util.register_dataclass(made, arrays, static)


def _replace(self: Any, **changes: Any) -> Any:
    """A copy with these fields changed."""
    return dataclasses.replace(self, **changes)
