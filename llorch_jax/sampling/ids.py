"""Settings of `Sampling` that name token ids: what they may be, and how they are passed to jit.

They have a leading axis of rows, 1 for all of them, and sizes rounded up to powers of two, so that other ids compile
nothing. Every setting has a value that does nothing, which rows of a superset have that do not use it.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from llorch_jax.buckets import power_of_two
from llorch_jax.errors import SamplerError
from llorch_jax.tracing import is_whole

_ID = re.compile("0|[1-9][0-9]{0,9}")  # as JSON writes it
Sizes = tuple[int, ...]


def bias_of_json(value: Any) -> dict[int, Any]:
    """A logit bias with ids as keys from one with texts as keys, as JSON has it.

    Raises:
        SamplerError: it is not a dict, or a key or a value is wrong; the message names the key.
    """
    if not isinstance(value, dict):
        raise SamplerError(f"logit_bias: expected an object from id to number, got {value!r:.80}")
    for id, bias in value.items():
        written = isinstance(id, str) and _ID.fullmatch(id)  # int would also take " 7", "0_7" and "٧"
        if not written and not is_whole(id):
            raise SamplerError(f"logit_bias: expected ids as keys, got {id!r:.40}")
        if not _is_bias({0: bias}):
            raise SamplerError(f"logit_bias: expected a number for the id {id}, got {bias!r:.40}")
    return {int(id): bias for id, bias in value.items()}


def _padded(rows: list[list[Any]], filler: Any, dtype: Any = np.int32, least: int = 0) -> np.ndarray:
    """Lists of several lengths as one array, its last axis a power of two."""
    out = np.full((len(rows), power_of_two(max(least, *map(len, rows)))), filler, dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def _bias_arrays(rows: Any, least: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and float32 bias, [R, N]."""
    ids = _padded([list(row) for row in rows], 0, least=least[0])
    with np.errstate(all="ignore"):
        bias = _padded([[*row.values()] for row in rows], 0, np.float32, least[0])
    return ids, bias


def _words_arrays(rows: Any, least: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """int32 words [R, W, M], padded on the left, and their sizes [R, W], 0 if there is none."""
    sizes = _padded([[len(word) for word in words] for words in rows], 0, least=least[0])
    longest = max(int(sizes.max(initial=1)), least[1])
    padded = np.zeros((*sizes.shape, power_of_two(longest)), np.int32)
    for row, words in zip(padded, rows, strict=True):
        for place, word in zip(row, words, strict=False):
            place[len(place) - len(word) :] = word
    return padded, sizes


def _forced_array(rows: Any, least: Sizes) -> np.ndarray:
    return _padded([[-1 if token is None else token for token in row] for row in rows], -1, least=least[0])


def _breakers_array(rows: Any, least: Sizes) -> np.ndarray:
    return _padded([*map(list, rows)], -1, least=least[0])


def _is_ids(value: Any) -> bool:
    return all(is_whole(each) and 0 <= each < 2**31 for each in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_bias(value: Any) -> bool:
    """A dict from id to a number that float32 has, or minus infinity, which bans the id."""
    if not isinstance(value, dict) or not _is_ids(value):
        return False
    known = np.asarray([*value.values(), 0.0])
    if known.dtype.kind not in "iuf" or any(isinstance(each, bool | np.bool_) for each in value.values()):
        return False
    with np.errstate(all="ignore"):
        small = known.astype(np.float32)
    return bool(np.all(np.isfinite(small) | np.isneginf(known)))


def _is_words(value: Any) -> bool:
    return _is_list(value) and all(_is_list(word) and len(word) and _is_ids(word) for word in value)


def _is_forced(value: Any) -> bool:
    return _is_list(value) and _is_ids([each for each in value if each is not None])


def _is_breakers(value: Any) -> bool:
    return _is_list(value) and _is_ids(value)


@dataclasses.dataclass(frozen=True)
class IdSetting:
    """A setting with token ids.

    Attributes:
        valid: whether a row's value is.
        arrays: makes the arrays [R, ...] of a list of rows, their other axes at least of given sizes.
        depth: how many lists are around an id.
        nothing: the value of a row that does not use it.
        least: sizes that a superset has room for before others are compiled.
    """

    valid: Callable[[Any], bool]
    arrays: Callable[[Any, Sizes], Any]
    depth: int
    nothing: Any
    least: Sizes

    def per_row(self, value: Any) -> bool:
        """Whether it is a list with a value for each row: one level deeper than the value of a row."""
        if self.depth == 0:
            return _is_list(value)
        if self.depth == 1:
            return _is_list(value) and len(value) > 0 and all(map(_is_list, value))
        return _is_list(value) and len(value) > 0 and all(_is_list(row) and all(map(_is_list, row)) for row in value)

    def rows(self, value: Any) -> list[Any]:
        """The values of the rows, one where it is for all."""
        return list(value) if self.per_row(value) else [value]

    def prepared(self, value: Any) -> Any:
        """The arrays of a valid value, no larger than needed."""
        return self.arrays(self.rows(value), (0,) * len(self.least))

    def holds(self, value: Any) -> bool:
        """Whether the value is valid, for all rows or for each."""
        rows = self.rows(value)
        ambiguous = self.depth == 2 and len(rows) == 1 and value == [[]]  # a row without words, or a word without ids?
        return len(rows) > 0 and not ambiguous and all(map(self.valid, rows))

    def is_off(self, value: Any) -> bool:
        """Whether a valid value does nothing."""
        return not any(map(len, self.rows(value)))


ID_SETTINGS = {
    "logit_bias": IdSetting(_is_bias, _bias_arrays, 0, {}, (16,)),
    "bad_words": IdSetting(_is_words, _words_arrays, 2, [], (8, 4)),
    "forced_tokens": IdSetting(_is_forced, _forced_array, 1, [], (16,)),
    "dry_breakers": IdSetting(_is_breakers, _breakers_array, 1, [], (16,)),
}
