"""The settings of `Sampling`: what they may be, what turns them off, and how they are passed to jit."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.errors import SamplerError
from llorch_jax.sampling.base import check
from llorch_jax.sampling.ids import ID_SETTINGS

COLDEST = 1e-30  # below, logits divided by the temperature could overflow float32
ALL = np.iinfo(np.int32).max  # a top_k that keeps all tokens
Valid = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: a number, or something with token ids, for all rows or one per row.

    Attributes:
        expected: what it must be, in words.
        valid: whether numbers are; None if it is not a number.
        off: the value that turns it off, as transformers, vLLM and llama.cpp have it.
        is_off: whether numbers are values that turn it off.
        dtype: that it is passed to jit in.
        needs_history: whether its transform uses the tokens so far.
    """

    expected: str
    valid: Valid | None = None
    off: Any = 0
    is_off: Callable[[Any], Any] = lambda x: x == 0
    dtype: str = "float32"
    needs_history: bool = False


def _finite(x: np.ndarray) -> Any:
    return np.isfinite(x)


def _unit(x: np.ndarray) -> Any:
    return (x >= 0) & (x <= 1)


def _positive(x: np.ndarray) -> Any:
    return (x > 0) & np.isfinite(x)


def _not_negative(x: np.ndarray) -> Any:
    return (x >= 0) & np.isfinite(x)


def _count(x: np.ndarray) -> Any:
    return (x >= 0) & (x == np.floor(x)) & (x < 2**31)


def _at_least_one(x: Any) -> Any:
    return x >= 1


FIRST: dict[str, Setting] = {
    "temperature": Setting(
        "0, for the most likely token, or finite numbers from 1e-30 up",
        lambda x: (x == 0) | ((x >= COLDEST) & np.isfinite(x)),
        off=1,
        is_off=lambda x: x == 1,
    ),
    "top_k": Setting(
        "whole numbers from 1 up, or 0 or -1 for all tokens",
        lambda x: (x >= -1) & (x == np.floor(x)),
        off=ALL,
        is_off=lambda x: (x <= 0) | (x >= ALL),
        dtype="int32",
    ),
    "top_p": Setting("numbers from 0 up to 1", _unit, off=1, is_off=_at_least_one),
}
SETTINGS: dict[str, Setting] = {
    "logit_bias": Setting("a dict from token id to a finite number or minus infinity, or a list of such, one per row"),
    "repetition_penalty": Setting(
        "finite numbers above 0", _positive, off=1, is_off=lambda x: x == 1, needs_history=True
    ),
    "frequency_penalty": Setting("finite numbers", _finite, needs_history=True),
    "presence_penalty": Setting("finite numbers", _finite, needs_history=True),
    "repeat_last_n": Setting(
        "whole numbers from 0 up, or -1 for the whole text",
        lambda x: (x == -1) | _count(x),
        off=-1,
        is_off=lambda x: x == -1,
        dtype="int32",
    ),
    "dry_multiplier": Setting("finite numbers from 0 up", _not_negative, needs_history=True),
    "dry_base": Setting("finite numbers from 1 up", lambda x: (x >= 1) & np.isfinite(x)),
    "dry_allowed_length": Setting("whole numbers from 0 up", _count, dtype="int32"),
    "dry_breakers": Setting("a list of token ids, or a list of such, one per row"),
    "no_repeat_ngram_size": Setting("whole numbers from 0 up", _count, dtype="int32", needs_history=True),
    "bad_words": Setting(
        "a list of lists of token ids, none empty, or a list of such, one per row", needs_history=True
    ),
    "min_new_tokens": Setting("whole numbers from 0 up", _count, dtype="int32", needs_history=True),
    "forced_tokens": Setting("a list of token ids or None, or a list of such, one per row", needs_history=True),
    "dynatemp_range": Setting("finite numbers from 0 up", _not_negative),
    "dynatemp_exponent": Setting("finite numbers from 0 up", _not_negative),
    "top_n_sigma": Setting("finite numbers, 0 or less for all tokens", _finite, is_off=lambda x: x <= 0),
    "min_p": Setting("numbers from 0 up to 1", _unit),
    "typical_p": Setting("numbers from 0 up to 1", _unit, off=1, is_off=_at_least_one),
    "epsilon_cutoff": Setting("numbers from 0 up to 1", _unit),
    "eta_cutoff": Setting("numbers from 0 up to 1", _unit),
    "xtc_probability": Setting("numbers from 0 up to 1", _unit),
    "xtc_threshold": Setting("numbers from 0 up to 1", _unit),
}
# Settings that say how others work, with their defaults; each comes with one of its owners.
COMPANIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "repeat_last_n": (("repetition_penalty", "frequency_penalty", "presence_penalty"), -1),
    "dry_base": (("dry_multiplier",), 1.75),
    "dry_allowed_length": (("dry_multiplier",), 2),
    "dry_breakers": (("dry_multiplier",), ()),
    "dynatemp_exponent": (("dynatemp_range",), 1.0),
    "xtc_threshold": (("xtc_probability",), 0.1),
}
_ELSEWHERE = {
    "bad_words_ids": "bad_words",
    "do_sample": "temperature, where 0 takes the most likely token",
    "dry_sequence_breakers": "dry_breakers",
    "max_length": "max_new_tokens of the call",
    "max_new_tokens": "max_new_tokens of the call",
    "max_tokens": "max_new_tokens of the call",
    "min_length": "min_new_tokens",
    "min_tokens": "min_new_tokens",
    "num_beams": "beam_search",
    "penalty_last_n": "repeat_last_n",
    "repeat_penalty": "repetition_penalty",
    "seed": "key of the call",
    "temp": "temperature",
    "typical": "typical_p",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises SamplerError for a setting that is unknown, out of range, or without the one that it belongs to."""
    known = {**FIRST, **SETTINGS}
    for name, value in settings.items():
        if name not in known:
            raise SamplerError(f"{name}: expected a setting of Sampling, got an unknown one{_hint(name, known)}")
        if value is None and name != "temperature":
            continue
        valid = known[name].valid
        if valid is not None:
            check(name, value, valid, known[name].expected)
        elif not ID_SETTINGS[name].holds(value):
            raise SamplerError(f"{name}: expected {known[name].expected}, got {value!r:.80}")
    for name, (owners, _) in COMPANIONS.items():
        if settings.get(name) is not None and all(settings.get(owner) is None for owner in owners):
            raise SamplerError(f"{name}: expected together with {' or '.join(owners)}, got it alone")


def _hint(name: str, known: Mapping[str, Any]) -> str:
    """The known setting that an unknown name may mean."""
    near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def is_off(name: str, value: Any) -> bool:
    """Whether a checked value turns its setting off in all rows; what belongs to another one never does."""
    if value is None:
        return True
    if name in COMPANIONS:
        return False
    if name in ID_SETTINGS:
        return ID_SETTINGS[name].is_off(value)
    return bool(np.all({**FIRST, **SETTINGS}[name].is_off(np.asarray(value))))


def is_mixed(name: str, value: Any) -> bool:
    """Whether a checked value turns its setting off in some rows, but not in others."""
    setting = {**FIRST, **SETTINGS}[name]
    if setting.valid is None or name in COMPANIONS or name == "temperature":
        return False
    off = setting.is_off(np.asarray(value))
    return bool(np.any(off) and not np.all(off))


def used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Checked settings without those that are off, and with the defaults of those that belong to others."""
    used = {name: value for name, value in settings.items() if not is_off(name, value)}
    for name, (owners, default) in COMPANIONS.items():
        if any(owner in used for owner in owners):
            used.setdefault(name, default)
        else:
            used.pop(name, None)
    if used.get("repeat_last_n") == -1:  # the whole text: nothing to compile in
        del used["repeat_last_n"]
    return used


def prepare_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Checked settings that are used, as arrays."""
    return {name: _array(name, value) for name, value in settings.items()}


def _array(name: str, value: Any) -> Any:
    if name in ID_SETTINGS:
        return jax.device_put(ID_SETTINGS[name].prepared(value))
    return jax.device_put(number_array(name, value))


def number_array(name: str, value: Any) -> np.ndarray:
    """A checked number, or one per row, in the type that it is passed to jit in."""
    setting = {**FIRST, **SETTINGS}[name]
    known = np.asarray(value)
    if name == "top_k":
        known = np.where(setting.is_off(known), ALL, np.minimum(known, ALL))
    return known.astype(setting.dtype)


def superset_settings(rows: Sequence[Mapping[str, Any]], like: Mapping[str, Any] | None) -> dict[str, Any]:
    """All settings as arrays with a leading axis of rows, off in the rows that do not have them.

    Args:
        rows: checked settings of each row.
        like: settings of another superset, whose sizes are kept where they are larger.
    """
    out = {}
    for name, setting in {**FIRST, **SETTINGS}.items():
        default = COMPANIONS[name][1] if name in COMPANIONS else setting.off
        if name in ID_SETTINGS:
            kind = ID_SETTINGS[name]
            values = [kind.nothing if row.get(name) is None else row[name] for row in rows]
            least = kind.least if like is None else tuple(map(max, kind.least, _sizes(like[name])))
            out[name] = kind.arrays(values, least)
        else:
            out[name] = number_array(name, [default if row.get(name) is None else row[name] for row in rows])
    return jax.device_put(out)


def _sizes(arrays: Any) -> tuple[int, ...]:
    """The sizes of prepared ids, without the number of rows."""
    return jax.tree.leaves(arrays)[0].shape[1:]


def rows_of(value: Any) -> int:
    """For how many rows a prepared setting is; 1 also where it is for all."""
    array = value[0] if isinstance(value, tuple) else value
    return array.shape[0] if array.ndim else 1


def of_rows(value: Any) -> jax.Array:
    """A prepared number of shape [] or [B] as [1] or [B]."""
    return jnp.reshape(value, -1)
