"""Checks on the host: whether values are traced, and whether a setting is a whole number in range."""

from typing import Any

import jax
import numpy as np

from llorch_jax.errors import LlorchError


def is_concrete(*values: Any) -> bool:
    """Whether all values are concrete, that is, none is traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def on_host(array: Any) -> np.ndarray:
    """The values of an array, of which other processes may hold parts; then all of them must call this."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def from_first_process(number: int) -> int:
    """A whole number that process 0 has found, in all processes that compute together; then all must call this."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number: an int or a NumPy integer, but not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def whole(name: str, value: Any, error: type[LlorchError], least: int = 1, most: int | None = None) -> int:
    """A setting as an int.

    Args:
        name: of the setting, for the message.
        value: what was given.
        error: class of the error.
        least: the smallest value allowed.
        most: the largest value allowed; None for no limit.

    Raises:
        error: the value is not a whole number in this range.
    """
    if is_whole(value) and value >= least and (most is None or value <= most):
        return int(value)
    expected = f"from {least} up" if most is None else f"in {least} .. {most}"
    raise error(f"{name}: expected a whole number {expected}, got {value!r:.80}")
