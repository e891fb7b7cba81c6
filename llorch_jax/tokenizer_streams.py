"""StreamDecoder: token ids to text, one by one; incomplete characters are held back."""

import abc
import codecs
import operator
import re
from typing import TYPE_CHECKING, Any

from llorch_jax.errors import TokenError

if TYPE_CHECKING:
    from llorch_jax.tokenizer import Tokenizer


class StreamDecoder(abc.ABC):
    """Decodes ids one by one; made by `Tokenizer.stream`.

    The results of all `push` calls and the final `flush`, concatenated, equal `Tokenizer.decode` of all ids, for any
    ids. The cost of a push does not depend on the number of earlier ones.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()

    def push(self, id: int) -> str:
        """The text that this id completes, possibly empty; an incomplete character is held back.

        Raises:
            TokenError: `id` is not an integer of 0 or greater; the decoder is unchanged.
        """
        id = check_id("id", id)
        return "" if id in self._skipped else self._push(id)

    @abc.abstractmethod
    def flush(self) -> str:
        """The text held back, incomplete bytes as U+FFFD; the decoder is then ready for another sequence."""

    @abc.abstractmethod
    def _push(self, id: int) -> str: ...


class ByteStream(StreamDecoder):
    """For byte-level tokenizers: Python's incremental UTF-8 decoder replaces invalid bytes just as the library does."""

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _push(self, id: int) -> str:
        return self._utf8.decode(self._tokenizer.bytes_of(id))


class WindowStream(StreamDecoder):
    """For other tokenizers: decodes the newest ids together with those already shown, and returns the new text.

    The library's `DecodeStream` works the same way, but raises "Invalid prefix" if a byte token changes the decoding of
    the byte tokens before it, and has no flush. Here nothing is shown during a run of byte tokens (`<0xE2>`).
    """

    _BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._ids: list[int] = []
        self._shown = 0  # how many of `_ids` have been shown and serve only as context

    def flush(self) -> str:
        text = self._new_text()
        self._ids, self._shown = [], 0
        return text

    def _push(self, id: int) -> str:
        token = self._tokenizer._backend.id_to_token(id)
        if token is None:
            return ""
        self._ids.append(id)
        if self._BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(shown) :]


def check_id(name: str, id: Any) -> int:
    try:
        index = -1 if isinstance(id, bool) else operator.index(id)
    except TypeError:
        index = -1
    if not 0 <= index < 2**31:
        raise TokenError(f"{name}: expected the id of a token, 0 or greater, got {id!r:.80}")
    return index
