"""The settings of `Sampling` beside temperature, top-k and top-p: what they may be, and how they are passed to jit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from llorch_jax.sampling.base import SamplerError, check

_COLDEST = 1e-30  # below, logits divided by the temperature could overflow float32
Valid = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: a number for all rows or one per row, or something else that holds for all rows.

    Attributes:
        expected: what it must be, in words.
        valid: whether numbers are; None for what is no number.
        dtype: that it is passed to jit in.
        needs_history: whether its transform looks at the tokens so far.
    """

    expected: str
    valid: Valid | None = None
    dtype: str = "float32"
    needs_history: bool = False

    @property
    def per_row(self) -> bool:
        """Whether rows may have values of their own."""
        return self.valid is not None


def _finite(x: np.ndarray) -> Any:
    return np.isfinite(x)


def _share(x: np.ndarray) -> Any:
    return (x > 0) & (x <= 1)


def _unit(x: np.ndarray) -> Any:
    return (x >= 0) & (x <= 1)


def _positive(x: np.ndarray) -> Any:
    return (x > 0) & np.isfinite(x)


def _count(x: np.ndarray) -> Any:
    return (x >= 0) & (x == np.floor(x)) & (x < 2**31)


_FIRST: dict[str, Setting] = {
    "temperature": Setting(
        "finite numbers from 1e-30 up (use Greedy() for the most likely token)",
        lambda x: (x >= _COLDEST) & np.isfinite(x),
    ),
    "top_k": Setting("whole numbers from 1 up", lambda x: (x >= 1) & (x == np.floor(x)), "int32"),
    "top_p": Setting("numbers above 0 and up to 1", _share),
}
SETTINGS: dict[str, Setting] = {
    "logit_bias": Setting("a dict from token id to finite number"),
    "repetition_penalty": Setting("finite numbers above 0", _positive, needs_history=True),
    "frequency_penalty": Setting("finite numbers", _finite, needs_history=True),
    "presence_penalty": Setting("finite numbers", _finite, needs_history=True),
    "dry_multiplier": Setting("numbers from 0 up", lambda x: (x >= 0) & np.isfinite(x), needs_history=True),
    "dry_base": Setting("finite numbers from 1 up", lambda x: (x >= 1) & np.isfinite(x)),
    "dry_allowed_length": Setting("whole numbers from 0 up", _count, "int32"),
    "dry_breakers": Setting("a list of token ids"),
    "no_repeat_ngram_size": Setting("whole numbers from 0 up", _count, "int32", needs_history=True),
    "bad_words": Setting("a list of lists of token ids, none empty", needs_history=True),
    "min_new_tokens": Setting("whole numbers from 0 up", _count, "int32", needs_history=True),
    "forced_tokens": Setting("a list of token ids or None", needs_history=True),
    "top_n_sigma": Setting("finite numbers above 0", _positive),
    "min_p": Setting("numbers from 0 up to 1", _unit),
    "typical_p": Setting("numbers above 0 and up to 1", _share),
    "epsilon_cutoff": Setting("numbers from 0 up to 1", _unit),
    "eta_cutoff": Setting("numbers from 0 up to 1", _unit),
    "xtc_probability": Setting("numbers from 0 up to 1", _unit),
    "xtc_threshold": Setting("numbers from 0 up to 1", _unit),
}
_COMPANIONS: dict[str, dict[str, Any]] = {
    "dry_multiplier": {"dry_base": 1.75, "dry_allowed_length": 2, "dry_breakers": ()},
    "xtc_probability": {"xtc_threshold": 0.1},
}


def check_settings(settings: dict[str, Any]) -> None:
    """Raises SamplerError for a setting that is unknown, out of range, or without the one that it belongs to."""
    known = {**_FIRST, **SETTINGS}
    for name, value in settings.items():
        if name not in known:
            raise SamplerError(f"{name}: expected one of {', '.join(known)}; got an unknown setting")
        if value is None and name != "temperature":
            continue
        valid = known[name].valid
        if valid is not None:
            check(name, value, valid, known[name].expected)
        elif not _ANY[name](value):
            raise SamplerError(f"{name}: expected {known[name].expected}, got {value!r}")
    for owner, companions in _COMPANIONS.items():
        for name in companions:
            if settings.get(name) is not None and settings.get(owner) is None:
                raise SamplerError(f"{name}: expected together with {owner}, got it alone")


def prepare_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings as arrays, with the defaults of those that belong to others."""
    given = {name: value for name, value in settings.items() if value is not None}
    for owner, companions in _COMPANIONS.items():
        if owner in given:
            given = {**companions, **given}
    return {name: _array(name, value) for name, value in given.items()}


def _array(name: str, value: Any) -> Any:
    if name == "logit_bias":
        return jnp.asarray(list(value), jnp.int32), jnp.asarray(list(value.values()), jnp.float32)
    if name == "bad_words":
        longest = max(len(word) for word in value)
        padded = [[0] * (longest - len(word)) + list(word) for word in value]
        return jnp.asarray(padded, jnp.int32), jnp.asarray([len(word) for word in value], jnp.int32)
    if name == "forced_tokens":
        return jnp.asarray([-1 if token is None else token for token in value], jnp.int32)
    if name == "dry_breakers":
        return jnp.asarray(list(value), jnp.int32)
    return jnp.asarray(value, jnp.dtype(SETTINGS[name].dtype))


def _is_ids(value: Any) -> bool:
    return all(isinstance(each, int | np.integer) and 0 <= each < 2**31 for each in value)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and _is_ids(value) and bool(np.all(np.isfinite([*value.values()])))


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(len(word) and _is_ids(word) for word in value)


def _is_forced(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and _is_ids([each for each in value if each is not None])


_ANY: dict[str, Callable[[Any], bool]] = {
    "logit_bias": _is_bias,
    "bad_words": _is_words,
    "forced_tokens": _is_forced,
    "dry_breakers": lambda value: isinstance(value, list | tuple) and _is_ids(value),
}
