"""Whether two caches are alike enough for the rows of one to go into the other."""

import dataclasses
from typing import Any

from llorch_jax.cache import axes
from llorch_jax.errors import CacheError


def describe(cache: Any) -> str:
    """Class, settings and dimensions of a cache, without its arrays."""
    settings = [f"codec={cache.codec.name}", f"residual={cache.residual}"]
    for field in dataclasses.fields(cache):
        if axes.is_setting(field) and field.name != "codec":
            settings.append(f"{field.name}={getattr(cache, field.name)}")
    layers, heads, head_dim = cache.dims
    return f"{type(cache).__name__}({', '.join(settings)}) of {layers} layers, {heads} kv heads and head_dim {head_dim}"


def check_alike(what: str, cache: Any, other: Any) -> None:
    """Raises CacheError unless another cache has the class, settings and model dimensions of a cache."""
    expected = describe(cache)
    got = describe(other)
    if expected != got:
        raise CacheError(f"{what}: expected {expected}, got {got}")


def check_same_sizes(cache: Any, other: Any, number: int) -> None:
    """Raises CacheError unless the rows of `other`, the cache of this number, have arrays of the same sizes."""
    expected = axes.row_shapes(cache)
    got = axes.row_shapes(other)
    if expected != got:
        raise CacheError(f"concat: expected rows of arrays {expected[0]}, got {got[0]} in caches[{number}]")


def check_fits_into(cache: Any, source: Any) -> None:
    """Raises CacheError where a row of the source has arrays larger than those of a cache's row."""
    for ours, theirs in zip(axes.row_shapes(cache), axes.row_shapes(source), strict=True):
        if any(mine < other for mine, other in zip(ours, theirs, strict=True)):
            raise CacheError(
                f"insert: expected a source whose rows have arrays no larger than {list(ours)}, as this cache has, "
                f"got {list(theirs)}; reserve or convert first"
            )
