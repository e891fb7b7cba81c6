"""The settings of `Sampling` beside temperature, top-k and top-p: what they may be, and how they are passed to jit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.buckets import power_of_two
from llorch_jax.errors import SamplerError
from llorch_jax.sampling.base import check

_COLDEST = 1e-30  # below, logits divided by the temperature could overflow float32
Valid = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: a number, or something with token ids, for all rows or for each row its own.

    Attributes:
        expected: what it must be, in words.
        valid: whether numbers are; None for what is no number.
        dtype: that it is passed to jit in.
        needs_history: whether its transform looks at the tokens so far.

    What has token ids is passed to jit with a leading axis of rows, 1 for all of them, and with sizes rounded up to
    powers of two, so that other ids compile nothing.
    """

    expected: str
    valid: Valid | None = None
    dtype: str = "float32"
    needs_history: bool = False


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
    "logit_bias": Setting("a dict from token id to finite number, or a list of such, one per row"),
    "repetition_penalty": Setting("finite numbers above 0", _positive, needs_history=True),
    "frequency_penalty": Setting("finite numbers", _finite, needs_history=True),
    "presence_penalty": Setting("finite numbers", _finite, needs_history=True),
    "dry_multiplier": Setting("numbers from 0 up", lambda x: (x >= 0) & np.isfinite(x), needs_history=True),
    "dry_base": Setting("finite numbers from 1 up", lambda x: (x >= 1) & np.isfinite(x)),
    "dry_allowed_length": Setting("whole numbers from 0 up", _count, "int32"),
    "dry_breakers": Setting("a list of token ids, or a list of such, one per row"),
    "no_repeat_ngram_size": Setting("whole numbers from 0 up", _count, "int32", needs_history=True),
    "bad_words": Setting(
        "a list of lists of token ids, none empty, or a list of such, one per row", needs_history=True
    ),
    "min_new_tokens": Setting("whole numbers from 0 up", _count, "int32", needs_history=True),
    "forced_tokens": Setting("a list of token ids or None, or a list of such, one per row", needs_history=True),
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
        elif not _ANY[name].holds(value):
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
    if name in _ANY:
        kind = _ANY[name]
        return kind.arrays(value if kind.per_row(value) else [value])
    return jnp.asarray(value, jnp.dtype(SETTINGS[name].dtype))


def rows_of(value: Any) -> int:
    """For how many rows a prepared setting is; 1 also where it is for all."""
    array = value[0] if isinstance(value, tuple) else value
    return array.shape[0] if array.ndim else 1


def _padded(rows: list[list[Any]], filler: Any, dtype: Any = np.int32) -> np.ndarray:
    """Lists of several lengths as one array, its last axis a power of two."""
    out = np.full((len(rows), power_of_two(max(map(len, rows)))), filler, dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def _bias_arrays(rows: Any) -> tuple[jax.Array, jax.Array]:
    """int32 ids and float32 bias, [R, N]."""
    ids, bias = _padded([list(row) for row in rows], 0), _padded([[*row.values()] for row in rows], 0, np.float32)
    return jnp.asarray(ids), jnp.asarray(bias)


def _words_arrays(rows: Any) -> tuple[jax.Array, jax.Array]:
    """int32 words [R, W, M], padded on the left, and their sizes [R, W], 0 where there is none."""
    sizes = _padded([[len(word) for word in words] for words in rows], 0)
    padded = np.zeros((*sizes.shape, power_of_two(int(sizes.max(initial=1)))), np.int32)
    for row, words in zip(padded, rows, strict=True):
        for place, word in zip(row, words, strict=False):
            place[len(place) - len(word) :] = word
    return jnp.asarray(padded), jnp.asarray(sizes)


def _forced_array(rows: Any) -> jax.Array:
    return jnp.asarray(_padded([[-1 if token is None else token for token in row] for row in rows], -1))


def _is_ids(value: Any) -> bool:
    return all(isinstance(each, int | np.integer) and 0 <= each < 2**31 for each in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and _is_ids(value) and bool(np.all(np.isfinite([*value.values()])))


def _is_words(value: Any) -> bool:
    return _is_list(value) and all(_is_list(word) and len(word) and _is_ids(word) for word in value)


def _is_forced(value: Any) -> bool:
    return _is_list(value) and _is_ids([each for each in value if each is not None])


@dataclasses.dataclass(frozen=True)
class _Ids:
    """A setting with token ids.

    Attributes:
        valid: whether a row's value is.
        arrays: makes the arrays of a list of rows.
        depth: how many lists are around an id.
        may_be_empty: whether it may name no id at all.
    """

    valid: Callable[[Any], bool]
    arrays: Callable[[Any], Any]
    depth: int
    may_be_empty: bool = False

    def per_row(self, value: Any) -> bool:
        """Whether it is a list with a value for each row: one level deeper than the value of a row."""
        if self.depth == 0:
            return _is_list(value)
        if self.depth == 1:
            return _is_list(value) and len(value) > 0 and all(map(_is_list, value))
        return _is_list(value) and len(value) > 0 and all(_is_list(row) and all(map(_is_list, row)) for row in value)

    def holds(self, value: Any) -> bool:
        """Whether the value is valid, for all rows or for each."""
        rows = list(value) if self.per_row(value) else [value]
        return all(map(self.valid, rows)) and (self.may_be_empty or any(map(len, rows)))


_ANY = {
    "logit_bias": _Ids(_is_bias, _bias_arrays, 0),
    "bad_words": _Ids(_is_words, _words_arrays, 2),
    "forced_tokens": _Ids(_is_forced, _forced_array, 1),
    "dry_breakers": _Ids(
        lambda value: _is_list(value) and _is_ids(value),
        lambda rows: jnp.asarray(_padded([*map(list, rows)], -1)),
        1,
        may_be_empty=True,
    ),
}
