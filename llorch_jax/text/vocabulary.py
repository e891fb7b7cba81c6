"""What a model and its tokenizer agree on: the tokenizer itself, the ids that it knows, and where DRY breaks off."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from llorch_jax.errors import ModelError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import breakers_of
from llorch_jax.sampling.making import BREAKERS
from llorch_jax.tokenizer import Tokenizer

Value = TypeVar("Value")
_found: "weakref.WeakKeyDictionary[Tokenizer, dict[Any, Any]]" = weakref.WeakKeyDictionary()


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer, or a ModelError."""
    if model.tokenizer is None:
        raise ModelError(f"model {model.name}: expected a tokenizer, got none; use generate_tokens with token ids")
    return model.tokenizer


def known_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    """Which of a model's ids the tokenizer knows, as bits int32 [1, ceil(V / 32)], the lowest first; None for all.

    A vocabulary that is padded to a round size has ids that stand for no text. They must never be drawn.
    """
    return _once(tokenizer, ("known_ids", vocab_size), lambda: _known_ids(tokenizer, vocab_size))


def breaker_ids(tokenizer: Tokenizer, marks: Sequence[str] = BREAKERS) -> list[int]:
    """The ids of the tokens that hold one of the marks."""
    marks = tuple(marks)

    def find() -> list[int]:
        texts = _once(tokenizer, "texts", lambda: _texts(tokenizer))
        return [id for id, text in texts.items() if breakers_of([text], marks)]

    return _once(tokenizer, ("breaker_ids", marks), find)


def _known_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    known = np.isin(np.arange(vocab_size), tokenizer.ids())
    if known.all():
        return None
    bits = np.packbits(np.pad(known, (0, -vocab_size % 32)), bitorder="little")
    return bits.view("<i4").astype(np.int32)[None]


def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    """The text of each token."""
    return {id: tokenizer.decode([id]) for id in tokenizer.ids().tolist()}


def _once(tokenizer: Tokenizer, key: Any, make: Callable[[], Value]) -> Value:
    """What `make` returns, kept as long as the tokenizer."""
    found = _found.setdefault(tokenizer, {})
    if key not in found:
        found[key] = make()
    return found[key]
