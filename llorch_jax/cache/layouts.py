"""The registry of layouts: caches by name or by a specification such as "rotating:256+4", with checked settings.

A new layout is one entry of `LAYOUTS`, which property tests, byte plans, the command line and messages use.
"""

import dataclasses
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

_ANY_CODEC = ("dtype", "codec", "residual")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A named kind of cache.

    Attributes:
        cls: its class.
        arguments: settings that a specification may give, in order, each with the character before it.
        needs: required settings.
        takes: optional keyword settings of `cls.init`, in addition to batch_size.
        fixed: settings that the name implies.
        lossless: whether logits are those of the static cache in float32, as long as the layout drops no token.
    """

    cls: type[KVCache]
    arguments: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = _ANY_CODEC
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    lossless: bool = True

    @property
    def has_capacity(self) -> bool:
        """Whether the number of tokens that a row can hold is a setting."""
        return "capacity" in self.takes


_CAPACITY = (("capacity", ":"),)


def _quantized(bits: int) -> Layout:
    takes = ("capacity", "bits", "residual")
    return Layout(QuantizedCache, _CAPACITY, takes=takes, fixed={"bits": bits}, lossless=False)


def _evicting(policy: Any) -> Layout:
    budget = (("budget", ":"),)
    return Layout(EvictingCache, budget, ("budget",), ("policy", "slack", *_ANY_CODEC), {"policy": policy}, False)


_PAGES = (("page_size", ":"), ("capacity", ":"))
_RING = (("window", ":"), ("sinks", "+"))
LAYOUTS: dict[str, Layout] = {
    "static": Layout(StaticCache, _CAPACITY, takes=("capacity", *_ANY_CODEC)),
    "dynamic": Layout(DynamicCache, _CAPACITY, takes=("capacity", "initial", *_ANY_CODEC)),
    "rotating": Layout(RotatingCache, _RING, ("window",), ("sinks", *_ANY_CODEC)),
    "paged": Layout(PagedCache, _PAGES, takes=("capacity", "page_size", "num_pages", *_ANY_CODEC)),
    "int8": _quantized(8),
    "int4": _quantized(4),
    "recent": _evicting(RecencyWindow()),
    "sinks": _evicting(AttentionSinks()),
    "h2o": _evicting(HeavyHitters()),
    "snapkv": _evicting(SnapKV()),
}
_MOST = 2**31 - 1  # the largest number allowed in a specification


def _syntax(name: str, layout: Layout) -> str:
    """How a layout is specified, such as rotating:WINDOW[+SINKS]."""
    text, open_brackets = name, 0
    for argument, mark in layout.arguments:
        optional = argument not in layout.needs
        text += f"{'[' if optional else ''}{mark}{argument.upper()}"
        open_brackets += optional
    return text + "]" * open_brackets


SYNTAX = ", ".join(_syntax(name, layout) for name, layout in LAYOUTS.items())


def make_cache(
    config: GPT2Config,
    layout: str | type[KVCache] = "static",
    *,
    batch_size: int = 1,
    capacity: int | None = None,
    dtype: Any = "float32",
    codec: Any = None,
    residual: int | None = None,
    **settings: Any,
) -> KVCache:
    """An empty cache of a layout.

    Args:
        config: the model's hyperparameters.
        layout: a name of `LAYOUTS`, a specification as `parse_cache_spec` reads it, or a class.
        batch_size: number of rows B.
        capacity: maximum number of tokens per row, if the layout has that setting; None means the capacity in the
            specification, or n_positions.
        dtype: dtype of stored keys and values: float32, bfloat16 or float16.
        codec: how they are stored, instead of `dtype`: float32, bfloat16, float16, int8 or int4.
        residual: number of newest tokens that a lossy codec also keeps in float32.
        settings: further arguments of the class's `init`, such as `window` or `page_size`.

    Raises:
        CacheError: the layout or a setting is unknown, missing or invalid.
        CapacityError: the capacity is not in 1 .. n_positions.
    """
    entry, own = _resolve(layout)
    given = {**own, **settings}
    for name, value, default in (
        ("capacity", capacity, None),
        ("dtype", dtype, "float32"),
        ("codec", codec, None),
        ("residual", residual, None),
    ):
        if value is not default and value != default:
            given[name] = value
    return _init(entry, config, {"batch_size": batch_size, **given})


def fit_cache(
    config: GPT2Config,
    layout: str | type[KVCache],
    batch_size: int,
    tokens: int,
    *,
    codec: Any = None,
    residual: int | None = None,
) -> KVCache:
    """An empty cache with room for `tokens` tokens per row and a capacity that is not much larger.

    A capacity in the specification, as in "static:1024", is kept: then no program depends on `tokens`.

    Raises:
        CacheError: the layout is unknown, or does not suit the model.
    """
    entry, own = _complete(layout)
    capacity = None
    if entry.has_capacity and "capacity" not in own:
        capacity = bucket(tokens, config.n_positions)
    return make_cache(config, layout, batch_size=batch_size, capacity=capacity, codec=codec, residual=residual)


def parse_cache_spec(spec: str) -> tuple[type[KVCache], dict[str, Any]]:
    """The class and settings that a specification such as "rotating:256+4" or "static:1024" stands for.

    Args:
        spec: a specification in the form of `SYNTAX`.

    Returns:
        The class, and the arguments for its `init` in addition to config, batch size and codec.

    Raises:
        CacheError: the specification does not have that form.
    """
    entry, settings = _complete(spec)
    return entry.cls, settings


def layout_of(cls: type[KVCache]) -> Layout:
    """The registry entry of a class, without the settings that a name implies.

    Raises:
        CacheError: the class is not in the registry.
    """
    for layout in LAYOUTS.values():
        if layout.cls is cls:
            return dataclasses.replace(layout, fixed={})
    raise CacheError(f"layout: expected a class of {', '.join(LAYOUTS)}, got {cls.__name__}")


def new_cache(cls: type[KVCache], config: GPT2Config, **settings: Any) -> KVCache:
    """The result of `cls.init(config, **settings)`, after a check of the settings' names."""
    return _init(layout_of(cls), config, settings)


def _resolve(layout: Any) -> tuple[Layout, dict[str, Any]]:
    """A layout's entry, and the settings that its specification names."""
    if isinstance(layout, type) and issubclass(layout, KVCache):
        return layout_of(layout), {}
    if not isinstance(layout, str):
        raise CacheError(f"cache: expected a name or a KVCache class, got a {type(layout).__name__}")
    name = re.split("[:+]", layout, maxsplit=1)[0]
    if name not in LAYOUTS:
        raise CacheError(f"cache: expected {SYNTAX}; got {layout!r:.80}")
    entry = LAYOUTS[name]
    return entry, {**entry.fixed, **_numbers(layout, layout.removeprefix(name), entry)}


def _complete(spec: Any) -> tuple[Layout, dict[str, Any]]:
    """As `_resolve`, for a specification that must name all required settings."""
    entry, settings = _resolve(spec)
    if not settings.keys() >= set(entry.needs):
        raise CacheError(f"cache: expected {SYNTAX}; got {spec!r:.80}")
    return entry, settings


def _numbers(spec: str, rest: str, entry: Layout) -> dict[str, int]:
    """The numbers of a specification after its name."""
    numbers: dict[str, int] = {}
    for argument, mark in entry.arguments:
        found = re.match(rf"{re.escape(mark)}([0-9]{{1,40}})", rest, re.ASCII)
        if found is None:
            break
        least = 0 if argument == "sinks" else 1
        number = int(found[1])
        if not least <= number <= _MOST:
            raise CacheError(f"cache: expected a {argument} from {least} to {_MOST} in {spec!r:.80}, got {number}")
        numbers[argument] = number
        rest = rest[found.end() :]
    if rest:
        raise CacheError(f"cache: expected {SYNTAX}; got {spec!r:.80}")
    return numbers


def _init(entry: Layout, config: GPT2Config, settings: dict[str, Any]) -> KVCache:
    """A cache, after a check that its class has these settings and that the required ones are given."""
    known = ("batch_size", *entry.needs, *entry.takes)
    name = entry.cls.__name__
    for each, value in settings.items():
        if each not in known:
            raise CacheError(f"{each}: {name} has {', '.join(known)}; got {each}={value!r:.80}")
    for each in entry.needs:
        if each not in settings and each not in entry.fixed:
            raise CacheError(f"{each}: expected a value, which {name} requires; got none")
    return entry.cls.init(config, **{**entry.fixed, **settings})  # type: ignore[attr-defined]  # the class's arguments
