"""Follows texts through the grammars of their constraints with `llguidance`, which is imported only when needed.

llguidance (github.com/guidance-ai/llguidance) keeps a lexer of derivatives of regular expressions and an Earley parser,
and walks a trie of the vocabulary for the set of tokens that may come next.
"""

import functools
import importlib
import importlib.util
import weakref
from typing import Any

import numpy as np

from llorch_jax.errors import ConstraintError
from llorch_jax.text.constrained.constraint import Constraint
from llorch_jax.tokenizer import Tokenizer

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KEPT = 64  # compiled constraints per tokenizer
_LONGEST = 300  # characters of an error message
_REASONS = {  # why llguidance's matcher stops
    "NoExtension": "expected one that some text matches",
    "LexerTooComplex": "expected one within llguidance's limits",
    "ParserTooComplex": "expected one within llguidance's limits",
}
_compilers: "weakref.WeakKeyDictionary[Tokenizer, dict[tuple[int, int], Compiler]]" = weakref.WeakKeyDictionary()


class Matcher:
    """Follows one text through its grammar, token by token; made by `Compiler.matcher`."""

    def __init__(self, inner: Any, numpy_helpers: Any, eos_ids: tuple[int, ...], hidden_ids: tuple[int, ...]) -> None:
        self._inner = inner
        self._helpers = numpy_helpers
        self._eos_ids = list(eos_ids)
        self._hidden = [*hidden_ids, *eos_ids]

    def push(self, token: int) -> bool:
        """Takes an allowed token that does not end the text, and returns whether another may follow.

        Raises:
            ConstraintError: the grammar does not allow it, or exceeds llguidance's limits.
        """
        self._inner.consume_token(token)
        self._check()
        return not self._inner.is_stopped()

    def fill(self, mask: np.ndarray, row: int) -> bool:
        """Writes the bits of the allowed tokens into a row of int32 [B, W], and returns whether the text may continue.

        If not, it is complete, and the bits are meaningless.

        Raises:
            ConstraintError: no token of the vocabulary can continue, or the grammar exceeds llguidance's limits.
        """
        self._helpers.fill_next_token_bitmask(self._inner, mask, row)
        self._check()
        # An id that ends a row always does so, so it is allowed only where the grammar may end.
        bits = mask[row].view(np.uint8)
        complete = self._inner.is_accepting()
        for id in self._hidden:
            bits[id // 8] &= ~np.uint8(1 << id % 8)
        goes_on = bool(bits.any())
        if not goes_on and not complete:
            raise ConstraintError("constraint: expected a token that goes on with the text, got none in the vocabulary")
        for id in self._eos_ids if complete else ():
            bits[id // 8] |= np.uint8(1 << id % 8)
        return goes_on

    def _check(self) -> None:
        if self._inner.is_error():
            raise ConstraintError(f"constraint: {_reason(self._inner.get_error())}")


class Compiler:
    """Compiles constraints for one vocabulary; made by `compiler_of`.

    Attributes:
        words: number W of int32 words in a row of a mask.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int) -> None:
        if tokenizer.vocab_size > vocab_size:
            raise ConstraintError(
                f"vocab_size: expected at least the {tokenizer.vocab_size} tokens of the tokenizer, got {vocab_size}"
            )
        self._library = _library("llguidance")
        self._helpers = _library("llguidance.numpy")
        try:
            self._tokenizer = self._library.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=eos_id)
        except ValueError as error:
            raise ConstraintError(f"tokenizer: expected one that llguidance can read ({_reason(error)})") from None
        self.words = (vocab_size + 31) // 32
        self._eos_id = eos_id
        self._prototype = functools.lru_cache(_KEPT)(self._compile)

    def matcher(self, constraint: Constraint, eos_ids: tuple[int, ...]) -> Matcher:
        """A matcher for one text, which `eos_ids` end; each constraint is compiled once.

        Raises:
            ConstraintError: the constraint is invalid, or matches nothing but the empty text.
        """
        return Matcher(self._prototype(constraint).deep_copy(), self._helpers, eos_ids, (self._eos_id,))

    def _compile(self, constraint: Constraint) -> Any:
        """A matcher of llguidance in its first state, with its first mask, which costs more than later ones."""
        try:
            matcher = self._library.LLMatcher(self._tokenizer, self._grammar(constraint), log_level=0)
        except ValueError as error:
            raise ConstraintError(f"{constraint.kind}: {_reason(error)}") from None
        if not matcher.is_error():
            mask = np.zeros((1, self.words), np.int32)
            self._helpers.fill_next_token_bitmask(matcher, mask)
        if matcher.is_error():
            raise ConstraintError(f"{constraint.kind}: {_reason(matcher.get_error())}, got {constraint.source[:60]!r}")
        ends = mask[0, self._eos_id // 32] >> self._eos_id % 32 & 1
        if np.bitwise_count(mask.view(np.uint32)).sum() == ends:
            raise ConstraintError(
                f"{constraint.kind}: expected one that some text of a character matches, got {constraint.source[:60]!r}"
            )
        return matcher

    def _grammar(self, constraint: Constraint) -> str:
        make, source = self._library.LLMatcher, constraint.source
        if constraint.kind == "json_schema":
            return make.grammar_from_json_schema(source, defaults=_JSON_STYLE)
        kind = {"choices": "choice"}.get(constraint.kind, constraint.kind)
        return self._library.grammar_from(kind, source)


def compiler_of(tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> Compiler:
    """The compiler for a model's vocabulary, made once per tokenizer.

    Raises:
        ConstraintError: llguidance is not installed or cannot read the tokenizer, or no id ends a text.
    """
    eos_id = tokenizer.eos_id if tokenizer.eos_id is not None else next(iter(eos_ids), None)
    if eos_id is None:
        raise ConstraintError(
            "constraint: expected an end-of-text id in the tokenizer, the model or stop_ids, got none"
        )
    compilers = _compilers.setdefault(tokenizer, {})
    key = (vocab_size, eos_id)
    if key not in compilers:
        compilers[key] = Compiler(tokenizer, *key)
    return compilers[key]


def can_constrain() -> bool:
    """Whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConstraintError(
            "constraint: expected llguidance, got no such package; pip install 'llorch-jax[constrained]'"
        ) from None


def _reason(message: Any) -> str:
    """One line of an error of llguidance, without the state of its parser and the grammar that it appends."""
    line = " ".join(str(message).partition("<state>")[0].split())
    for reason, meaning in _REASONS.items():
        if line.startswith(reason):
            return meaning
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
