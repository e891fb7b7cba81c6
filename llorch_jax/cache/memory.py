"""The bytes that a cache will take, caches by name, and a pool that hands out released buffers again."""

import dataclasses
import inspect
import re
import threading
from collections.abc import Hashable
from functools import partial
from typing import Any, TypeVar

import jax

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache, is_concrete
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.evicting import EvictingCache
from llorch_jax.cache.paged import PagedCache
from llorch_jax.cache.policies import AttentionSinks, HeavyHitters, RecencyWindow, SnapKV
from llorch_jax.cache.quantized import QuantizedCache
from llorch_jax.cache.rotating import RotatingCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.params import nbytes

Cache = TypeVar("Cache", bound=KVCache)
Strategy = str | type[KVCache]

STRATEGIES: dict[str, tuple[type[KVCache], dict[str, Any]]] = {
    "static": (StaticCache, {}),
    "dynamic": (DynamicCache, {}),
    "rotating": (RotatingCache, {}),
    "paged": (PagedCache, {}),
    "int8": (QuantizedCache, {"bits": 8}),
    "int4": (QuantizedCache, {"bits": 4}),
    "recent": (EvictingCache, {"policy": RecencyWindow()}),
    "sinks": (EvictingCache, {"policy": AttentionSinks()}),
    "h2o": (EvictingCache, {"policy": HeavyHitters()}),
    "snapkv": (EvictingCache, {"policy": SnapKV()}),
}
SYNTAX = (
    "static, dynamic, rotating:WINDOW, rotating:WINDOW+SINKS, paged, paged:PAGE_SIZE, int8, int4, "
    "recent:BUDGET, sinks:BUDGET, h2o:BUDGET or snapkv:BUDGET"
)
_SPEC = re.compile(
    r"(static|dynamic|int8|int4)|(recent|sinks|h2o|snapkv):(?P<budget>[0-9]+)|paged(?::(?P<page_size>[0-9]+))?|rotating:(?P<window>[0-9]+)(?:\+(?P<sinks>[0-9]+))?"
)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a cache before it is made; `int(plan)` is their total.

    Attributes:
        total: of all arrays, equal to `memory_usage()` of the new cache.
        full: of a `DynamicCache` that has grown to its capacity; equal to `total` for the other layouts, of which only
            the block tables of a `PagedCache` grow.
        per_layer: of one layer's keys and values in the new cache.
        per_token: of one slot: keys and values of one token in all layers, scales included.
        overhead: of everything else: lengths, block tables, what is kept twice.
        slots: for how many tokens there is memory, all rows together.
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
    strategy: Strategy = "static",
    *,
    batch_size: int = 1,
    capacity: int | None = None,
    dtype: Any = "float32",
    **settings: Any,
) -> MemoryPlan:
    """The bytes that `make_cache` with the same arguments allocates, exactly; nothing is allocated here.

    Raises:
        CacheError, CapacityError: as `make_cache`.
    """
    make = partial(make_cache, config, strategy, batch_size=batch_size, capacity=capacity, dtype=dtype)
    shapes: Any = jax.eval_shape(partial(make, **settings))
    full = shapes
    if "initial" in _parameters(type(shapes)):
        full = jax.eval_shape(partial(make, **{**settings, "initial": shapes.capacity}))
    layers = shapes.layout[0]
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


def make_cache(
    config: GPT2Config,
    strategy: Strategy = "static",
    *,
    batch_size: int = 1,
    capacity: int | None = None,
    dtype: Any = "float32",
    **settings: Any,
) -> KVCache:
    """An empty cache of a strategy.

    Args:
        config: the model's hyperparameters.
        strategy: a name of `STRATEGIES`, a specification as `parse_cache_spec` reads it, or a class.
        batch_size: number of rows B.
        capacity: tokens per row where the layout lets one choose; None means n_positions.
        dtype: of keys and values as stored, where the layout lets one choose.
        settings: further arguments of the class's `init`, such as `window` or `page_size`.

    Raises:
        CacheError: the strategy or a setting is unknown, missing or impossible.
        CapacityError: the capacity is not in 1 .. n_positions.
    """
    cls, own = _resolve(strategy)
    settings = {**own, **settings, "batch_size": batch_size}
    if capacity is not None:
        settings["capacity"] = capacity
    if "dtype" in _parameters(cls) or dtype != "float32":
        settings["dtype"] = dtype
    _check_settings(cls, settings)
    return cls.init(config, **settings)  # type: ignore[attr-defined]  # each class has its own arguments


def fit_cache(config: GPT2Config, strategy: Strategy, batch_size: int, tokens: int) -> KVCache:
    """An empty cache with room for so many tokens per row and, where the layout has a capacity, for few more.

    Raises:
        CacheError: the strategy is unknown, or does not fit the model.
    """
    cls, _ = _resolve(strategy)
    capacity = bucket(tokens, config.n_positions) if "capacity" in _parameters(cls) else None
    return make_cache(config, strategy, batch_size=batch_size, capacity=capacity)


def parse_cache_spec(spec: str) -> tuple[type[KVCache], dict[str, Any]]:
    """The class and settings that a specification such as "rotating:256+4" stands for.

    Args:
        spec: as `SYNTAX` says.

    Returns:
        The class, and the arguments for its `init` beside config, batch size, capacity and dtype.

    Raises:
        CacheError: the specification is none of these.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise CacheError(f"cache: expected {SYNTAX}; got {spec!r}")
    cls, settings = STRATEGIES[spec.partition(":")[0]]
    numbers = {name: int(number) for name, number in found.groupdict().items() if number is not None}
    for name, number in numbers.items():
        if number < 1 and name != "sinks":
            raise CacheError(f"cache: expected a {name} from 1 up in {spec!r}, got {number}")
    return cls, {**settings, **numbers}


def _resolve(strategy: Strategy) -> tuple[type[KVCache], dict[str, Any]]:
    if isinstance(strategy, str):
        return STRATEGIES[strategy] if strategy in STRATEGIES else parse_cache_spec(strategy)
    if not (isinstance(strategy, type) and issubclass(strategy, KVCache)):
        raise CacheError(f"strategy: expected a name or a KVCache class, got {strategy!r}")
    return strategy, {}


def _parameters(cls: type[KVCache]) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a class's `init`."""
    parameters = inspect.signature(cls.init).parameters  # type: ignore[attr-defined]
    return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}


def _check_settings(cls: type[KVCache], settings: dict[str, Any]) -> None:
    """Raises CacheError for settings that the class does not have, or that it needs and did not get."""
    known = _parameters(cls)
    for name, value in settings.items():
        if name not in known:
            raise CacheError(f"{name}: {cls.__name__} has {', '.join(known)}; got {name}={value!r}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in settings:
            raise CacheError(f"{name}: expected a value, {cls.__name__} cannot do without; got none")


class CachePool:
    """Keeps the buffers of released caches and hands them out again, so that a call need not allocate its own.

    Thread-safe. A cache is acquired, goes through any number of steps, and the last cache of the chain is released.
    That one is donated: its buffers belong to the pool from then on, and JAX refuses any further use of it, as of
    every other cache that shares them.

        pool = CachePool()
        cache = pool.acquire(StaticCache, config, batch_size=1, capacity=256)
        tokens, cache = generate_tokens(params, config, prompt, cache=cache)
        pool.release(cache)
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """An empty pool.

        Args:
            max_bytes: how much it keeps at most; a cache that would exceed it is dropped on release. None: no limit.
        """
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._free: dict[Hashable, list[KVCache]] = {}
        self._kinds: dict[Hashable, Hashable] = {}  # from arguments to what `allocation` of the new cache would be

    def acquire(self, cls: type[Cache], config: GPT2Config, **settings: Any) -> Cache:
        """An empty cache as `cls.init(config, **settings)` makes it, in released buffers where there are any that fit.

        A layout that grows may come with larger buffers than a new one has.

        Raises:
            CacheError, CapacityError: as `init`.
        """
        _check_settings(cls, settings)
        make = partial(cls.init, config, **settings)  # type: ignore[attr-defined]
        arguments = (cls, config, tuple(sorted((name, str(value)) for name, value in settings.items())))
        with self._lock:
            if arguments not in self._kinds:
                self._kinds[arguments] = jax.eval_shape(make).allocation()
            free = self._free.get(self._kinds[arguments])
            if free:
                return free.pop()  # type: ignore[return-value]  # the class is part of the kind
        return make()

    def release(self, cache: KVCache) -> None:
        """Takes a cache over; neither it nor any cache that shares its buffers can be used afterwards.

        Raises:
            CacheError: it has been donated to a later step or released before, or is traced.
        """
        if not is_concrete(cache):
            raise CacheError("release: expected a cache outside jit, got a traced one")
        with self._lock:  # so that of two threads that release the same cache one is refused
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
                raise CacheError(
                    "release: expected a cache that owns its buffers; this one was donated to a later step or released "
                    "before (release the last cache of the chain)"
                )
            if self._max_bytes is not None and self._usage() + cache.memory_usage() > self._max_bytes:
                return
            mine = _take_over(cache.clear())
            self._free.setdefault(mine.allocation(), []).append(mine)

    def drop(self) -> None:
        """Gives all kept buffers back to the system."""
        with self._lock:
            self._free.clear()

    def memory_usage(self) -> int:
        """Bytes of all kept buffers."""
        with self._lock:
            return self._usage()

    def _usage(self) -> int:
        return sum(cache.memory_usage() for caches in self._free.values() for cache in caches)


@partial(jax.jit, donate_argnames="cache")
def _take_over(cache: Cache) -> Cache:
    """The same cache in the same memory under new handles; the old ones become invalid."""
    return cache
