"""Texts longer than the context: which tokens are kept and encoded again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CapacityError
from llorch_jax.tracing import is_whole


@dataclasses.dataclass(frozen=True)
class Reencode:
    """Settings for texts that outgrow the context: their first and newest tokens are kept and encoded again.

    GPT-2's learned positions end at n_positions, so keys and values cannot stay where they are as in StreamingLLM
    (Xiao et al. 2023, 2309.17453), whose sinks these are. The kept tokens get new positions, and what follows is
    exactly what the model predicts after them.

    Attributes:
        sinks: number of first tokens to keep.
        window: number of newest tokens to keep; None means half of the context.
    """

    sinks: int = 4
    window: int | None = None

    def kept(self, row: np.ndarray, context: int) -> np.ndarray:
        """The tokens that are kept of a row that has outgrown a context of `context` tokens.

        Raises:
            CapacityError: sinks and window leave no room for a new token.
        """
        window = max(1, context // 2) if self.window is None else self.window
        possible = is_whole(self.sinks) and is_whole(window) and self.sinks >= 0 and window >= 1
        if not possible or self.sinks + window > context:
            raise CapacityError(
                f"overflow: expected sinks >= 0 and window >= 1 that fit the context of {context}, "
                f"got sinks={self.sinks}, window={window}"
            )
        return row if len(row) <= self.sinks + window else np.concatenate([row[: self.sinks], row[-window:]])


def check_overflow(overflow: str | Reencode) -> Reencode | None:
    """The settings of a re-encoding, or None where an overflow is an error."""
    if overflow == "error":
        return None
    if overflow == "reencode":
        return Reencode()
    if isinstance(overflow, Reencode):
        return overflow
    raise CapacityError(f"overflow: expected 'error', 'reencode' or a Reencode, got {overflow!r:.80}")


def context_of(config: GPT2Config, cache: KVCache | None) -> int:
    """Number of tokens that fit. The cache must be empty, as tokens that it held could not be encoded again."""
    if cache is None:
        return config.n_positions
    if np.any(np.asarray(cache.lengths)):
        raise CapacityError("overflow: expected an empty cache and the whole text as the prompt, to encode it anew")
    return min(config.n_positions, cache.capacity)


def shortened(reencode: Reencode, tokens: Any, lengths: Any, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, T] with lengths [B]; those that do not fit the context are reduced to what is kept of them."""
    rows = [row[:n] for row, n in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]
    return padded([reencode.kept(row, context) if len(row) > context else row for row in rows])


def padded(rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of several lengths as int32 [B, T], padded on the right, and their lengths int32 [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths
