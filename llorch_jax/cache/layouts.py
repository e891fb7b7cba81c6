"""Caches by name: the registry of layouts."""

import inspect
import re
from typing import Any

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.evicting.cache import EvictingCache
from llorch_jax.cache.evicting.policies import AttentionSinks, HeavyHitters, RecencyWindow, SnapKV
from llorch_jax.cache.paged.cache import PagedCache
from llorch_jax.cache.quantized import QuantizedCache
from llorch_jax.cache.rotating import RotatingCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError

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
    if "dtype" in parameters_of(cls) or dtype != "float32":
        settings["dtype"] = dtype
    check_settings(cls, settings)
    return cls.init(config, **settings)  # type: ignore[attr-defined]  # each class has its own arguments


def fit_cache(config: GPT2Config, strategy: Strategy, batch_size: int, tokens: int) -> KVCache:
    """An empty cache with room for so many tokens per row and, where the layout has a capacity, for few more.

    Raises:
        CacheError: the strategy is unknown, or does not fit the model.
    """
    cls, _ = _resolve(strategy)
    capacity = bucket(tokens, config.n_positions) if "capacity" in parameters_of(cls) else None
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


def parameters_of(cls: type[KVCache]) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a class's `init`."""
    parameters = inspect.signature(cls.init).parameters  # type: ignore[attr-defined]
    return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}


def check_settings(cls: type[KVCache], settings: dict[str, Any]) -> None:
    """Raises CacheError for settings that the class does not have, or that it needs and did not get."""
    known = parameters_of(cls)
    for name, value in settings.items():
        if name not in known:
            raise CacheError(f"{name}: {cls.__name__} has {', '.join(known)}; got {name}={value!r}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in settings:
            raise CacheError(f"{name}: expected a value, {cls.__name__} cannot do without; got none")
