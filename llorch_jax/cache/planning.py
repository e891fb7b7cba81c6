"""The exact number of bytes that a cache will take, before it is made."""

import dataclasses
from functools import partial
from typing import Any

import jax

from llorch_jax.cache.base import KVCache
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.layouts import make_cache
from llorch_jax.config import GPT2Config
from llorch_jax.params import nbytes


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a cache before it is made; `int(plan)` is their total.

    Attributes:
        total: bytes of all arrays, equal to `memory_usage()` of the new cache.
        full: bytes of a `DynamicCache` that has grown to its capacity; equal to `total` for the other layouts, of which
            only the block tables of a `PagedCache` grow.
        per_layer: bytes of one layer's keys and values in the new cache.
        per_token: bytes of one slot: keys and values of one token in all layers, including scales.
        overhead: bytes of everything else: lengths, block tables, float windows.
        slots: number of tokens for which there is memory, in all rows together.
    """

    total: int
    full: int
    per_layer: int
    per_token: int
    overhead: int
    slots: int

    def __int__(self) -> int:
        return self.total


def plan_memory(
    config: GPT2Config,
    layout: str | type[KVCache] = "static",
    *,
    batch_size: int = 1,
    capacity: int | None = None,
    dtype: Any = "float32",
    codec: Any = None,
    residual: int | None = None,
    **settings: Any,
) -> MemoryPlan:
    """The exact number of bytes that `make_cache` allocates with the same arguments; nothing is allocated here.

    Raises:
        CacheError, CapacityError: as `make_cache`.
    """
    stored = {"dtype": dtype, "codec": codec, "residual": residual}
    make = partial(make_cache, config, layout, batch_size=batch_size, capacity=capacity, **stored)
    shapes: Any = jax.eval_shape(partial(make, **settings))
    full = shapes
    if isinstance(shapes, DynamicCache):
        full = jax.eval_shape(partial(make, **{**settings, "initial": shapes.capacity}))
    layers = shapes.dims[0]
    per_layer = nbytes((shapes.keys[0], shapes.values[0]))
    first = jax.tree.leaves(shapes.keys)[0]  # [rows or pages, K, slots, ...]
    slots = first.shape[0] * first.shape[2]
    return MemoryPlan(
        total=nbytes(shapes),
        full=nbytes(full),
        per_layer=per_layer,
        per_token=layers * per_layer // slots,
        overhead=nbytes(shapes) - layers * per_layer,
        slots=slots,
    )
