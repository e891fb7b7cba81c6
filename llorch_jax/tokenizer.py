"""Tokenizer: text to token ids and back, over the `tokenizers` library.

GPT-2's tokenizer is byte-level BPE (Radford et al. 2019, section 2.2): every byte is a symbol of the vocabulary, so
every text has an encoding, and a character may be split over several tokens.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from llorch_jax import files
from llorch_jax.errors import CheckpointError, TokenError
from llorch_jax.tokenizer_files import END_OF_TEXT, MERGES, SETTINGS, VOCAB, WHOLE, read_directory, read_pair
from llorch_jax.tokenizer_streams import ByteStream, StreamDecoder, WindowStream, check_id


class Tokenizer:
    """An immutable tokenizer; make one with `from_directory` or `gpt2`.

    Special tokens written out in a text become their ids, and `decode` writes them out again unless told to skip them,
    as transformers' GPT2TokenizerFast does by default. With a tokenizer like GPT-2's (byte-level, no normalizer, no
    added prefix space) `decode(encode(text)) == text` for every text; no spaces are cleaned up.

    An id of 0 or greater that the tokenizer lacks, as in a padded vocabulary, decodes to nothing.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str | None = None) -> None:
        """A wrapper around a tokenizer of the `tokenizers` library.

        Args:
            backend: the library's tokenizer.
            eos_token: the token that ends a text, as written in texts; None for `<|endoftext|>`, if it exists.

        Raises:
            TokenError: an added token is spelled like a vocabulary token that stands for other bytes.
        """
        # A tokenizer.json may ask for truncation or padding, which are meant for training batches, not for prompts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._eos_token = END_OF_TEXT if eos_token is None else eos_token
        self._drops_text = _drops_text(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._is_byte_level = _is_byte_level(backend)
        self._bytes: dict[int, bytes] = {}  # of the ids decoded so far
        if self._is_byte_level:
            _check_added(backend, [token.content for token in added.values()])
            # An added token stands for its letters, even if these are also symbols of bytes.
            self._bytes |= {id: token.content.encode() for id, token in added.items()}

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> "Tokenizer | None":
        """The tokenizer of a model directory: its `tokenizer.json`, else its `vocab.json` with `merges.txt`.

        The pair is read as GPT-2's byte-level BPE, with `<|endoftext|>` as a special token if the vocabulary has it.
        Further files are read as in transformers: `tokenizer_config.json` (added and special tokens,
        `add_prefix_space`, `add_bos_token`, `add_eos_token`, `split_special_tokens`), or, if it does not list the added
        tokens, `special_tokens_map.json` and `added_tokens.json`.

        Returns:
            The tokenizer, or None if the directory has neither.

        Raises:
            CheckpointError: there is no such directory, one file of the pair is missing, a file is corrupt, the files
                contradict each other, or they require a different kind of tokenizer.
        """
        folder = Path(path)
        with files.explaining(folder, CheckpointError):
            if not folder.is_dir():
                raise CheckpointError(f"{files.shown(folder)}: expected a model directory, found none; check the path")
        found = read_directory(folder)
        if found is None:
            return None
        try:
            return cls(*found)
        except TokenError as error:
            raise CheckpointError(f"{files.shown(folder)}: {error}") from None

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """The tokenizer of GPT-2, bundled with the package: 50257 tokens, the last of them `<|endoftext|>`."""
        folder = Path(__file__).parent / "assets" / "gpt2-bpe"
        return cls(read_pair(folder / VOCAB, folder / MERGES))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added and special ones. A model's `config.vocab_size` may be padded beyond it."""
        return self._backend.get_vocab_size()

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, or None. The ids at which a model's texts end are in `config.eos_ids`."""
        return self._backend.token_to_id(self._eos_token)

    def ids(self) -> np.ndarray:
        """All ids that the tokenizer has tokens for, int32, ascending; there may be gaps."""
        return np.sort(np.fromiter(self._backend.get_vocab().values(), np.int64)).astype(np.int32)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it (byte-level: a space is `Ġ`), or None if there is no such token.

        Raises:
            TokenError: `token` is not a valid string.
        """
        return self._backend.token_to_id(_check_text("token", token))

    def id_to_token(self, id: int) -> str:
        """A token as the vocabulary spells it, which for non-ASCII text is not what it decodes to.

        Raises:
            TokenError: there is no such id.
        """
        token = self._backend.id_to_token(check_id("id", id))
        if token is None:
            raise TokenError(f"id: expected the id of one of the tokenizer's {self.vocab_size} tokens, got {id}")
        return token

    def num_bytes(self, id: int) -> int:
        """Number of UTF-8 bytes that a token stands for, even if they are not a whole character.

        Raises:
            TokenError: `id` is not an integer of 0 or greater.
        """
        id = check_id("id", id)
        return len(self.bytes_of(id) if self._is_byte_level else self.decode([id]).encode())

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written out in the text become their ids.

        Args:
            text: any text.
            add_special_tokens: add the tokens that the tokenizer's files ask for, such as one at the beginning, as
                transformers does by default; most GPT-2 tokenizers ask for none.

        Raises:
            TokenError: `text` is not a string, contains lone surrogates, or has characters that the vocabulary lacks.
        """
        _check_text("text", text)
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
            whole = self._backend.encode(text, add_special_tokens=True).ids if add_special_tokens else ids
        except Exception as error:  # the library raises nothing narrower
            raise TokenError(f"text: expected text that the tokenizer can encode ({error})") from None
        if self._drops_text and (decoded := self.decode(ids)) != text:
            lost = "".join(sorted(set(text) - set(decoded)))
            raise TokenError(f"text: expected characters that the tokenizer's vocabulary covers, got {lost!r:.80}")
        return whole

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Text of token ids, without clean-up; bytes that are not UTF-8 become U+FFFD, and unknown ids nothing.

        Args:
            ids: integers of shape [T], T >= 0: a sequence, or an array of any integer dtype.
            skip_special_tokens: leave special tokens out. The default is False, as in transformers.

        Raises:
            TokenError: `ids` are misshapen, not integers, or negative.
        """
        given = _check_ids(ids)
        if not self._is_byte_level:
            return self._backend.decode(given, skip_special_tokens=skip_special_tokens)
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.bytes_of(id) for id in given if id not in skipped).decode("utf-8", "replace")

    def stream(self, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one at a time; its pieces add up to the result of `decode` for all of them."""
        kind = ByteStream if self._is_byte_level else WindowStream
        return kind(self, skip_special_tokens)

    def to_json(self) -> str:
        """The tokenizer in the format of `tokenizer.json`."""
        return self._backend.to_str()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers reads too, into a directory.

        The directory is created if necessary.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WHOLE).write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        settings: dict[str, Any] = {"split_special_tokens": True} if self._backend.encode_special_tokens else {}
        if isinstance(self._backend.pre_tokenizer, pre_tokenizers.ByteLevel):
            settings["add_prefix_space"] = self._backend.pre_tokenizer.add_prefix_space
        if self.eos_id is not None:
            settings["eos_token"] = self._eos_token
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def bytes_of(self, id: int) -> bytes:
        """The bytes of an id of a byte-level tokenizer; empty if there is no such token."""
        found = self._bytes.get(id)
        if found is None:
            token = self._backend.id_to_token(id)
            found = self._bytes[id] = b"" if token is None else _token_bytes(token)
        return found


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's symbol of each byte: printable Latin-1 stands for itself, the rest are mapped to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """The bytes of a vocabulary token; a token with other symbols stands for itself, as in the library's decoder."""
    try:
        return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in token)
    except KeyError:
        return token.encode()


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens are bytes, one symbol each, and decoding only joins them."""
    if backend.decoder is None:
        return False
    described = json.loads(backend.decoder.__getstate__())
    steps = described["decoders"] if described["type"] == "Sequence" else [described]
    return [step["type"] for step in steps] == ["ByteLevel"]


def _check_added(backend: tokenizers.Tokenizer, contents: list[str]) -> None:
    """Raises TokenError for an added token with the spelling of a vocabulary token that stands for other bytes.

    Its id would stand for two texts: for its letters, if they are written in a text, and for the bytes whose symbols
    the letters are, if merges of the vocabulary produce it.
    """
    for content in contents:
        if _token_bytes(content) == content.encode():
            continue
        model = json.loads(backend.to_str())["model"]  # rarely reached: only for letters beyond ASCII
        merges = model.get("merges", [])
        spelled = {merge if isinstance(merge, str) else " ".join(merge) for merge in merges}
        if len(content) == 1 or content in {each.replace(" ", "") for each in spelled}:
            raise TokenError(
                f"added token {content!r:.80}: expected one that the vocabulary does not spell alike, "
                f"got the token of the bytes {_token_bytes(content)!r:.80}"
            )


def _drops_text(backend: tokenizers.Tokenizer) -> bool:
    """Whether encoding silently drops bytes whose symbols the vocabulary lacks, as there is no token for unknowns."""
    splitter = backend.pre_tokenizer
    reversible = isinstance(splitter, pre_tokenizers.ByteLevel) and not splitter.add_prefix_space
    if not reversible or backend.normalizer is not None or getattr(backend.model, "unk_token", None) is not None:
        return False
    return any(backend.token_to_id(symbol) is None for symbol in _BYTE_OF_SYMBOL)


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
    given: list[int] = array.tolist()
    for position, id in enumerate(given):
        check_id(f"ids[{position}]", id)
    return given
