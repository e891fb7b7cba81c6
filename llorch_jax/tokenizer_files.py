"""The tokenizer's files in a model directory, read as in transformers, or refused by name."""

import dataclasses
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from llorch_jax import files
from llorch_jax.errors import CheckpointError

END_OF_TEXT = "<|endoftext|>"

WHOLE = "tokenizer.json"
VOCAB = "vocab.json"
MERGES = "merges.txt"
SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"

_AGAIN = "download it again"
# The classes of transformers whose vocabulary and merges are GPT-2's byte-level BPE.
_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_MORE_SPECIAL = ("extra_special_tokens", "additional_special_tokens")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The contents of the files next to the vocabulary.

    Attributes:
        folder: the model directory.
        fields: of `tokenizer_config.json`, and those of `special_tokens_map.json` if transformers reads them.
        overriding: names of the fields that come from `special_tokens_map.json`.
        listed: whether `tokenizer_config.json` lists the added tokens.
        added: tokens that are not in the vocabulary's own file, by id.
        special: special tokens by their names, such as "eos_token".
    """

    folder: Path
    fields: dict[str, Any]
    overriding: frozenset[str]
    listed: bool
    added: dict[int, AddedToken]
    special: dict[str, AddedToken]

    def path(self, name: str) -> Path:
        """The file from which a field was read."""
        return self.folder / (SPECIAL if name in self.overriding else SETTINGS)

    def content(self, name: str) -> str | None:
        """The special token of a name, as written in texts, or None."""
        return self.special[name].content if name in self.special else None

    def flag(self, name: str) -> bool | None:
        """A setting that is true or false; None if it is missing."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self.path(name)}: {name}: expected true or false, got {value!r:.80}")
        return value


def read_directory(folder: Path) -> tuple[tokenizers.Tokenizer, str | None] | None:
    """The backend of a directory's tokenizer, and the token that ends a text if the files name one.

    Returns:
        None if the directory has neither `tokenizer.json` nor `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: a file is missing or corrupt, or requires something unsupported.
    """
    whole, vocab, merges = (folder / name for name in (WHOLE, VOCAB, MERGES))
    there = {path: files.exists(path, CheckpointError) for path in (whole, vocab, merges)}
    if not any(there.values()):
        return None
    settings = _read_settings(folder)
    if there[whole]:
        backend = _read_whole(whole)
        _set_prefix_space(backend, settings)
    else:
        for present, missing in ((vocab, merges), (merges, vocab)):
            if not there[missing]:
                raise CheckpointError(f"{missing}: missing, but {present.name} needs it; copy both or {WHOLE}")
        backend = _read_described_pair(vocab, merges, settings)
    _add_tokens(backend, settings)
    if not there[whole]:  # as in transformers: a tokenizer.json already says which tokens surround a text
        _add_ends(backend, settings)
    backend.encode_special_tokens = bool(settings.flag("split_special_tokens"))
    return backend, settings.content("eos_token")


def read_pair(
    vocab_path: Path, merges_path: Path, added: dict[str, int] | None = None, prefix_space: bool = False
) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE over a vocabulary and its merges.

    Args:
        vocab_path: JSON object of tokens and their ids.
        merges_path: text file with one merge per line.
        added: further tokens and their ids, which may leave gaps.
        prefix_space: put a space before a text that does not begin with one.
    """
    vocab = _read_vocab(vocab_path)
    return from_pieces(vocab, _read_merges(merges_path, vocab), added, prefix_space)


def from_pieces(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    added: dict[str, int] | None = None,
    prefix_space: bool = False,
) -> tokenizers.Tokenizer:
    """As `read_pair`, of a vocabulary and merges that have been checked."""
    backend = tokenizers.Tokenizer(models.BPE({**vocab, **(added or {})}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def _read_settings(folder: Path) -> Settings:
    fields = _read_object(folder / SETTINGS)
    listed = "added_tokens_decoder" in fields
    # Where tokenizer_config.json lists the added tokens, transformers reads neither of the two older files.
    overriding = {} if listed else _read_object(folder / SPECIAL)
    settings = Settings(folder, {**fields, **overriding}, frozenset(overriding), listed, {}, {})
    special = _special_tokens(settings)
    contents = {END_OF_TEXT, *(token.content for token in special.values())}  # END_OF_TEXT by default
    if listed:
        added = _listed_tokens(folder / SETTINGS, fields["added_tokens_decoder"])
    else:
        path = folder / ADDED
        added = {}
        for content, id in _read_object(path).items():
            is_special = content in contents
            added[_id(path, content, id)] = AddedToken(content, special=is_special, normalized=not is_special)
    return dataclasses.replace(settings, added=added, special=special)


def _special_tokens(settings: Settings) -> dict[str, AddedToken]:
    """The tokens named by fields such as "eos_token", and those in groups of additional ones."""
    found = {}
    for name, value in settings.fields.items():
        if name in _MORE_SPECIAL:
            for place, each in _group(settings.path(name), name, value):
                found[place] = _token(settings.path(name), place, each, special=True)
        elif name.endswith("_token") and isinstance(value, str | dict):
            found[name] = _token(settings.path(name), name, value, special=True)
    return found


def _group(path: Path, group: str, value: Any) -> list[tuple[str, Any]]:
    """Names and values of additional special tokens, which may be a list or an object."""
    if value is None:
        return []
    if isinstance(value, dict):
        return list(value.items())
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: {group}: expected a list of tokens, got {value!r:.80}; {_AGAIN}")
    return [(f"{group}[{number}]", each) for number, each in enumerate(value)]


def _listed_tokens(path: Path, value: Any) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder` by id."""
    name = "added_tokens_decoder"
    if not isinstance(value, dict) or not all(id.isdecimal() and id.isascii() for id in value):
        raise CheckpointError(f"{path}: {name}: expected ids and their tokens, got {value!r:.80}; {_AGAIN}")
    return {_id(path, name, int(id)): _token(path, f"{name}[{id}]", each) for id, each in value.items()}


def _id(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise CheckpointError(f"{path}: {name!r:.80}: expected an id of 0 or greater, got {value!r:.80}; {_AGAIN}")
    return value


def _token(path: Path, name: str, value: Any, special: bool = False) -> AddedToken:
    """A token as transformers' files describe it: its text, or an object of its properties."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
        raise CheckpointError(f"{path}: {name:.80}: expected a token, got {value!r:.80}; {_AGAIN}")
    flags = {key: fields[key] for key in ("lstrip", "rstrip", "single_word", "normalized", "special") if key in fields}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{path}: {name:.80}: expected true or false for each property, got {value!r:.80}")
    return AddedToken(fields["content"], **{**flags, "special": special or flags.get("special", False)})


def _read_described_pair(vocab: Path, merges: Path, settings: Settings) -> tokenizers.Tokenizer:
    """The pair, with the added tokens at the ids given in the files."""
    kind = settings.fields.get("tokenizer_class")
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{settings.path('tokenizer_class')}: tokenizer_class: expected GPT2Tokenizer for {vocab.name} and "
            f"{merges.name}, got {kind!r:.80}; save it as {WHOLE}, which says how it splits a text"
        )
    own = _read_vocab(vocab)
    taken = {id: token for token, id in own.items()}
    for id, token in settings.added.items():
        if taken.get(id, token.content) != token.content or own.get(token.content, id) != id:
            raise _misplaced(settings, token, id, own.get(token.content, taken.get(id)))
    added = {token.content: id for id, token in settings.added.items()}
    return read_pair(vocab, merges, added, bool(settings.flag("add_prefix_space")))


def _misplaced(settings: Settings, token: AddedToken, id: int, found: Any) -> CheckpointError:
    path = settings.folder / (SETTINGS if settings.listed else ADDED)
    return CheckpointError(
        f"{path}: expected id {id} for the added token {token.content!r:.80}, but the vocabulary has "
        f"{found!r:.80} there; are the files of one model?"
    )


def _add_tokens(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """Adds what the backend lacks, as transformers does: first the tokens with ids, then the special ones without."""
    for id, token in sorted(settings.added.items()):
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != id:
            raise _misplaced(settings, token, id, found)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = {token.content: token for token in settings.special.values() if token.content not in known}
    # Naming a vocabulary token as special, such as Ċ for a newline, does not make its symbols stand for letters.
    bytewise = {each for each in missing if not each.isascii() and backend.token_to_id(each) is not None}
    backend.add_tokens([token for content, token in missing.items() if content not in bytewise])


def _add_ends(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """Makes `encode(..., add_special_tokens=True)` add the surrounding tokens that the files ask for."""
    template, needed = ["$A"], []
    for flag, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        if not settings.flag(flag):
            continue
        content = settings.content(name) or END_OF_TEXT
        id = backend.token_to_id(content)
        if id is None:
            raise CheckpointError(
                f"{settings.path(flag)}: {flag}: expected {content!r:.80} in the vocabulary, found none"
            )
        template = [content, *template] if name == "bos_token" else [*template, content]
        needed.append((content, id))
    if needed:
        backend.post_processor = processors.TemplateProcessing(single=template, pair=None, special_tokens=needed)


def _set_prefix_space(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """Applies the `add_prefix_space` of `tokenizer_config.json`, as transformers' class for GPT-2 does."""
    wanted, splitter = settings.flag("add_prefix_space"), backend.pre_tokenizer
    if wanted is not None and isinstance(splitter, pre_tokenizers.ByteLevel):
        splitter.add_prefix_space = wanted
        backend.pre_tokenizer = splitter


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not files.exists(path, CheckpointError):
        return {}
    value = files.read_json(path, CheckpointError, _AGAIN)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {str(value)[:40]!r}; {_AGAIN}")
    return value


def _read_whole(path: Path) -> tokenizers.Tokenizer:
    files.check_regular(path, CheckpointError)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises nothing narrower, and panics, which are no Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{path}: expected a tokenizer of the `tokenizers` library, got another file or a corrupt one ({error}); "
            f"{_AGAIN}, or remove it where there are a {VOCAB} and a {MERGES}"
        ) from None


def _read_vocab(path: Path) -> dict[str, int]:
    # Checked here because the library skips, wraps around or merges ids that are no distinct 32-bit integers.
    vocab = files.read_json(path, CheckpointError, _AGAIN)
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path}: expected a JSON object of tokens and their ids, got {str(vocab)[:40]!r}")
    seen: set[int] = set()
    for token, id in vocab.items():
        if type(id) is not int or not 0 <= id < 2**32 or id in seen:
            raise CheckpointError(
                f"{path}: expected distinct ids of 0 or greater, got {id!r:.80} for token {token!r:.80}"
            )
        seen.add(id)
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    # Checked here because the library panics, which is no Exception, at some merges that the vocabulary lacks.
    lines = files.read_text(path, CheckpointError, _AGAIN).split("\n")
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        merges.append(check_merge(line, vocab, f"{path}, line {number}"))
    return merges


def check_merge(line: str, vocab: dict[str, int], where: str) -> tuple[str, str]:
    """The two tokens of a merge.

    Raises:
        CheckpointError: they, or the token that they become, are not in the vocabulary.
    """
    left, _, right = line.partition(" ")
    if any(token not in vocab for token in (left, right, left + right)):
        expected = "expected two tokens of the vocabulary whose concatenation is a third"
        raise CheckpointError(f"{where}: {expected}, got {line[:40]!r}; are both of one model?")
    return left, right
