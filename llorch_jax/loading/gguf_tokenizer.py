"""The tokenizer in a GGUF file's metadata."""

from typing import Any

from tokenizers import AddedToken

from llorch_jax.errors import CheckpointError, TokenError
from llorch_jax.loading.gguf_files import GGUF
from llorch_jax.tokenizer import Tokenizer
from llorch_jax.tokenizer_files import check_merge, from_pieces

_NORMAL, _CONTROL, _USER = 1, 3, 4  # types of tokens


def tokenizer_in(file: GGUF) -> Tokenizer | None:
    """The tokenizer; None if the file has none.

    Raises:
        CheckpointError: it is not GPT-2's byte-level BPE, or its parts contradict each other.
    """
    kind = file.fields.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return None
    if kind != "gpt2":
        raise CheckpointError(f"{file.path}: tokenizer.ggml.model: expected gpt2, got {kind!r:.60}")
    tokens = _texts(file, "tokenizer.ggml.tokens")
    types = file.fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    # Writers omit empty lists; a vocabulary of single symbols has no merges.
    single = all(len(token) == 1 or type != _NORMAL for token, type in zip(tokens, types, strict=False))
    merges = [] if single else _texts(file, "tokenizer.ggml.merges")
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or len(types) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens: expected distinct tokens, each with a type")
    pairs = [
        check_merge(line, vocab, f"{file.path}: tokenizer.ggml.merges, {number}") for number, line in enumerate(merges)
    ]
    backend = from_pieces(vocab, pairs)
    for token, type in zip(tokens, types, strict=True):
        if type in (_CONTROL, _USER):
            backend.add_tokens([AddedToken(token, special=type == _CONTROL, normalized=False)])
    end = file.fields.get("tokenizer.ggml.eos_token_id")
    try:
        return Tokenizer(backend, tokens[end] if isinstance(end, int) and 0 <= end < len(tokens) else None)
    except TokenError as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def _texts(file: GGUF, name: str) -> list[str]:
    found: Any = file.fields.get(name)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise CheckpointError(f"{file.path}: {name}: expected a list of texts, got {found!r:.60}")
    return found
