"""Tokenizer: text to token ids and back, over the `tokenizers` library; StreamDecoder: ids to text one by one.

GPT-2's tokenizer is byte-level BPE (Radford et al. 2019, section 2.2): every byte is a symbol of the vocabulary, so
any text has an encoding, and a character may be spread over several tokens.
"""

import abc
import codecs
import json
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llorch_jax.errors import CheckpointError, TokenError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """An immutable tokenizer; make one with `from_directory` or `gpt2`.

    Special tokens written out in a text become their ids, and `decode` writes them out again unless told to skip them:
    both are the defaults of transformers' GPT2TokenizerFast. With GPT-2's own kind of tokenizer (byte-level, no
    normalizer, no added prefix space) `decode(encode(text)) == text` for every text; no spaces are cleaned up.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # A tokenizer.json may ask for truncation or padding, which belong to training batches, not to a prompt.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._drops_text = _drops_text(backend)
        self._special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> "Tokenizer | None":
        """The tokenizer of a model directory: its `tokenizer.json`, else its `vocab.json` with `merges.txt`.

        The pair is read as GPT-2's byte-level BPE without a prefix space, `<|endoftext|>` being special where the
        vocabulary has it.

        Returns:
            The tokenizer, or None where the directory has none of these files.

        Raises:
            CheckpointError: there is no such directory, one file of the pair is missing, or a file is corrupt.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: expected a model directory, found none; check the path")
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if whole.exists():
            return cls(_read_whole(whole))
        if not vocab.exists() and not merges.exists():
            return None
        for present, missing in ((vocab, merges), (merges, vocab)):
            if not missing.exists():
                raise CheckpointError(f"{missing}: missing, but {present.name} needs it; copy both or tokenizer.json")
        return cls(_read_pair(vocab, merges))

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's own tokenizer: 50257 tokens, the last of them `<|endoftext|>`. It comes with the package."""
        folder = Path(__file__).parent / "assets" / "gpt2-bpe"
        return cls(_read_pair(folder / "vocab.json", folder / "merges.txt"))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added and special ones included. A model's `config.vocab_size` may be padded beyond it."""
        return self._backend.get_vocab_size()

    @property
    def eos_id(self) -> int | None:
        """Id of `<|endoftext|>`, or None; a model that ends its texts otherwise says so in `config.eos_ids`."""
        return self.token_to_id(END_OF_TEXT)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it (byte-level: a space is `Ġ`), or None where it has no such token.

        Raises:
            TokenError: `token` is no valid string.
        """
        return self._backend.token_to_id(_check_text("token", token))

    def id_to_token(self, id: int) -> str:
        """A token as the vocabulary spells it, which for non-ASCII text is not what it decodes to.

        Raises:
            TokenError: there is no such id.
        """
        return self._token("id", id)

    def num_bytes(self, id: int) -> int:
        """How many UTF-8 bytes of a text a token stands for, also where they are no whole character.

        Raises:
            TokenError: there is no such id.
        """
        token = self._token("id", id)
        if isinstance(self._backend.decoder, decoders.ByteLevel):
            return len(_token_bytes(token))
        return len(self.decode([id]).encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; none are added, and special tokens written out in the text become their ids.

        Raises:
            TokenError: `text` is no string, holds lone surrogates, or has characters that the vocabulary lacks.
        """
        _check_text("text", text)
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            raise TokenError(f"text: expected text that the tokenizer can encode ({error})") from None
        if self._drops_text and (decoded := self.decode(ids)) != text:
            lost = "".join(sorted(set(text) - set(decoded)))
            raise TokenError(f"text: expected characters that the tokenizer's vocabulary covers, got {lost!r}")
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Text of token ids, nothing cleaned up; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: integers of shape [T], T >= 0: a sequence, or an array of any integer dtype.
            skip_special_tokens: leave special tokens out. The default is False, as transformers' is.

        Raises:
            TokenError: `ids` are misshapen, not integers, or unknown to the vocabulary.
        """
        known = _check_ids(ids)
        for position, id in enumerate(known):  # the library would skip unknown ids without a word
            self._token(f"ids[{position}]", id)
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = False) -> "StreamDecoder":
        """A decoder for ids that come one at a time; it yields what `decode` yields for all of them."""
        kind = _ByteStream if isinstance(self._backend.decoder, decoders.ByteLevel) else _WindowStream
        return kind(self, skip_special_tokens)

    def to_json(self) -> str:
        """The tokenizer in the format of `tokenizer.json`."""
        return self._backend.to_str()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, which transformers reads too, into a directory, made where there is none."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    def _token(self, name: str, id: Any) -> str:
        try:
            index = -1 if isinstance(id, bool) else operator.index(id)
        except TypeError:
            index = -1
        token = self._backend.id_to_token(index) if 0 <= index < 2**32 else None
        if token is None:
            raise TokenError(f"{name}: expected the id of one of the tokenizer's {self.vocab_size} tokens, got {id!r}")
        return token


class StreamDecoder(abc.ABC):
    """Decodes ids one by one; made by `Tokenizer.stream`.

    The concatenation of all that `push` and the final `flush` return is `Tokenizer.decode` of all ids, whatever the
    ids. A push costs the same however many came before it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer._special_ids if skip_special_tokens else frozenset()

    def push(self, id: int) -> str:
        """The text that this id makes certain, maybe none; a character still incomplete is held back.

        Raises:
            TokenError: there is no such id; the decoder stays as it was.
        """
        token = self._tokenizer._token("id", id)
        return "" if int(id) in self._skipped else self._push(int(id), token)

    @abc.abstractmethod
    def flush(self) -> str:
        """The text held back, incomplete bytes as U+FFFD; the decoder is then ready for another sequence."""

    @abc.abstractmethod
    def _push(self, id: int, token: str) -> str: ...


class _ByteStream(StreamDecoder):
    """For byte-level tokenizers: Python's incremental UTF-8 decoder replaces invalid bytes just as the library does."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _push(self, id: int, token: str) -> str:
        return self._utf8.decode(_token_bytes(token))


class _WindowStream(StreamDecoder):
    """For other tokenizers: decodes the newest ids again behind those already shown, and returns what came on top.

    The library's own `DecodeStream` works so too, but raises "Invalid prefix" where a byte token changes what the byte
    tokens before it decode to, and has no flush. Here nothing is shown while a run of byte tokens (`<0xE2>`) lasts.
    """

    _BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._ids: list[int] = []
        self._shown = 0  # how many of `_ids` are shown already and serve as context only

    def flush(self) -> str:
        text = self._new_text()
        self._ids, self._shown = [], 0
        return text

    def _push(self, id: int, token: str) -> str:
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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's symbol of each byte: printable Latin-1 stands for itself, the rest are shifted to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """What the library's byte-level decoder makes of a token; an added token with other symbols stands for itself."""
    try:
        return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in token)
    except KeyError:
        return token.encode()


def _drops_text(backend: tokenizers.Tokenizer) -> bool:
    """Whether encoding drops bytes silently: where the vocabulary lacks their symbols and has no token for unknowns."""
    splitter = backend.pre_tokenizer
    reversible = isinstance(splitter, pre_tokenizers.ByteLevel) and not splitter.add_prefix_space
    if not reversible or backend.normalizer is not None or getattr(backend.model, "unk_token", None) is not None:
        return False
    return any(backend.token_to_id(symbol) is None for symbol in _BYTE_OF_SYMBOL)


def _read_whole(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises nothing narrower, and panics, which are no Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{path}: expected a tokenizer of the `tokenizers` library, got another file or a corrupt one ({error}); "
            "download it again, or remove it where there are a vocab.json and a merges.txt"
        ) from None


def _read_pair(vocab_path: Path, merges_path: Path) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE over a vocabulary and its merges."""
    vocab = _read_vocab(vocab_path)
    backend = tokenizers.Tokenizer(models.BPE(vocab, _read_merges(merges_path, vocab)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def _read_vocab(path: Path) -> dict[str, int]:
    # Checked here because the library skips, wraps around or merges ids that are no distinct 32-bit integers.
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON ({error}); download it again") from None
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path}: expected a JSON object of tokens and their ids, got {str(vocab)[:40]!r}")
    seen: set[int] = set()
    for token, id in vocab.items():
        if type(id) is not int or not 0 <= id < 2**32 or id in seen:
            raise CheckpointError(f"{path}: expected distinct ids of 0 or greater, got {id!r} for token {token!r}")
        seen.add(id)
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    # Checked here because the library panics, which is no Exception, at some merges that the vocabulary lacks.
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected UTF-8 text ({error}); download it again") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if any(token not in vocab for token in (left, right, left + right)):
            expected = "expected two tokens of vocab.json whose concatenation is a third"
            raise CheckpointError(f"{path}, line {number}: {expected}, got {line[:40]!r}; are both files of one model?")
        merges.append((left, right))
    return merges


def _check_text(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise TokenError(f"{name}: expected a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"lone surrogate {text[error.start]!r} at position {error.start}"
        raise TokenError(f"{name}: expected text that UTF-8 can encode, got {got}") from None
    return text


def _check_ids(ids: Any) -> list[int]:
    try:
        array = np.asarray(ids)
    except ValueError:
        raise TokenError("ids: expected integers of shape [T], got rows of unequal length; decode each row") from None
    if array.ndim != 1:
        raise TokenError(f"ids: expected integers of shape [T], got shape {list(array.shape)}; decode each row")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TokenError(f"ids: expected integers, got dtype {array.dtype}")
    return array.tolist()
