"""Whether two caches are alike enough to move rows from one to the other."""

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
    """Raises CacheError unless two caches have the same class, settings and model dimensions."""
    expected = describe(cache)
    got = describe(other)
    if expected != got:
        raise CacheError(f"{what}: expected {expected}, got {got}")


def check_same_sizes(cache: Any, other: Any, number: int) -> None:
    """Raises CacheError unless the rows of `other`, cache `number` of a list, have arrays of the same sizes."""
    expected = axes.row_shapes(cache)
    got = axes.row_shapes(other)
    if expected != got:
        raise CacheError(f"concat: expected rows of arrays {expected[0]}, got {got[0]} in caches[{number}]")


def check_fits_into(cache: Any, source: Any) -> None:
    """Raises CacheError if the source's rows have larger arrays than the cache's rows."""
    for ours, theirs in zip(axes.row_shapes(cache), axes.row_shapes(source), strict=True):
        if any(mine < other for mine, other in zip(ours, theirs, strict=True)):
            raise CacheError(
                f"insert: expected a source whose rows have arrays no larger than {list(ours)}, those of this cache, "
                f"got {list(theirs)}; reserve or convert first"
            )
