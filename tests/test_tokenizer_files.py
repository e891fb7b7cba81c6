"""Files around a vocabulary: tokens and settings as transformers reads them, or an error that names the file.

The expected ids are those of transformers 5.24 for the same directories, except where a test says otherwise.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from llorch_jax.errors import CheckpointError
from llorch_jax.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {token: id for id, token in enumerate([*ALPHABET, "ab", "Ġab", "<|endoftext|>"])}
MERGES = "#version: 0.2\na b\nĠ ab\n"
END = 258


def write(folder: Path, vocab: dict[str, int] = VOCAB, **contents: Any) -> Path:
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text(MERGES)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def read(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer is not None
    return tokenizer


def write_whole(folder: Path, vocab: dict[str, int] = VOCAB, **contents: Any) -> Path:
    """The same as one tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "ab")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def listed(content: str, **properties: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
    } | properties


@pytest.mark.parametrize("make", [write, write_whole])
def test_added_tokens_are_one_id_each(tmp_path: Path, make: Any) -> None:
    tokenizer = read(make(tmp_path, added_tokens={"<|user|>": 259, "<pad>": 260}))
    assert tokenizer.encode("ab<|user|>ab<pad>") == [256, 259, 256, 260]
    assert tokenizer.vocab_size == 261
    assert tokenizer.decode([259, 256], skip_special_tokens=True) == "<|user|>ab"  # nothing says that it is special
    assert tokenizer.decode([END, 256], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("make", [write, write_whole])
def test_special_tokens_map_says_which_are_special(tmp_path: Path, make: Any) -> None:
    special = {"eos_token": listed("<|user|>"), "additional_special_tokens": ["<a>"], "pad_token": "<pad>"}
    tokenizer = read(make(tmp_path, added_tokens={"<|user|>": 259, "<a>": 260}, special_tokens_map=special))
    assert tokenizer.encode("<|user|> ab<a><pad>") == [259, 257, 260, 261]
    assert tokenizer.decode([259, 257, 260, 261], skip_special_tokens=True) == " ab"
    assert tokenizer.eos_id == 259


@pytest.mark.parametrize("make", [write, write_whole])
def test_the_list_of_added_tokens_in_the_configuration_comes_first(tmp_path: Path, make: Any) -> None:
    config = {
        "added_tokens_decoder": {"259": listed("<s>", special=True), "260": listed("<left>", lstrip=True)},
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", **listed("<s>")},
        "extra_special_tokens": {"end_of_turn": "<turn>"},
    }
    tokenizer = read(
        make(tmp_path, tokenizer_config=config, added_tokens={"<old>": 259}, special_tokens_map={"pad_token": "<pad>"})
    )
    assert tokenizer.encode("ab <left><s><turn>") == [256, 260, 259, 261]
    assert tokenizer.decode([256, 259, 261], skip_special_tokens=True) == "ab"
    assert tokenizer.token_to_id("<old>") is None
    assert tokenizer.token_to_id("<pad>") is None
    assert tokenizer.eos_id == 259


def test_added_tokens_may_leave_gaps(tmp_path: Path) -> None:
    """Unlike transformers, which gives them the next free ids without a word."""
    tokenizer = read(write(tmp_path, added_tokens={"<far>": 300, "<near>": 262}))
    assert tokenizer.encode("<far><near>") == [300, 262]
    assert tokenizer.decode([300, 261, 262]) == "<far><near>"
    assert tokenizer.ids().tolist() == [*range(259), 262, 300]


def test_the_end_of_a_text_may_be_an_added_token(tmp_path: Path) -> None:
    vocab = {token: id for token, id in VOCAB.items() if id != END}
    tokenizer = read(write(tmp_path, vocab, added_tokens={"<|endoftext|>": END}))
    assert tokenizer.encode("ab<|endoftext|>") == [256, END]
    assert tokenizer.eos_id == END
    assert tokenizer.decode([256, END], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [256]),
        ({"add_bos_token": False, "add_eos_token": None}, [256]),
        ({"add_bos_token": True}, [END, 256]),
        ({"add_eos_token": True, "eos_token": "Ġab"}, [256, 257]),
        ({"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}, [259, 256, END]),
    ],
)
def test_tokens_around_a_text_are_added_when_asked(
    tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    tokenizer = read(write(tmp_path, tokenizer_config=settings))
    assert tokenizer.encode("ab", add_special_tokens=True) == expected
    assert tokenizer.encode("ab") == [256]
    tokenizer.save(tmp_path / "again")
    again = read(tmp_path / "again")
    assert again.encode("ab", add_special_tokens=True) == expected
    assert again.eos_id == tokenizer.eos_id


def test_a_whole_tokenizer_says_by_itself_what_is_around_a_text(tmp_path: Path) -> None:
    write_whole(tmp_path, tokenizer_config={"add_bos_token": True})
    assert read(tmp_path).encode("ab", add_special_tokens=True) == [256]
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", END)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert read(tmp_path).encode("ab", add_special_tokens=True) == [END, 256]


@pytest.mark.parametrize("make", [write, write_whole])
@pytest.mark.parametrize(("wanted", "expected"), [(True, [257]), (False, [256]), (None, [256])])
def test_a_space_before_a_text(tmp_path: Path, make: Any, wanted: bool | None, expected: list[int]) -> None:
    tokenizer = read(make(tmp_path, tokenizer_config={"add_prefix_space": wanted}))
    assert tokenizer.encode("ab") == expected
    tokenizer.save(tmp_path / "again")
    assert read(tmp_path / "again").encode("ab") == expected


def test_special_tokens_in_a_text_may_be_split(tmp_path: Path) -> None:
    config = {"split_special_tokens": True, "added_tokens_decoder": {"259": listed("<s>", special=True)}}
    tokenizer = read(write(tmp_path, tokenizer_config=config))
    assert tokenizer.encode("<s>") == [VOCAB["<"], VOCAB["s"], VOCAB[">"]]
    tokenizer.save(tmp_path / "again")
    assert read(tmp_path / "again").encode("<s>") == tokenizer.encode("<s>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens", [], "expected a JSON object"),
        ("added_tokens", "{", "expected JSON"),
        ("added_tokens", "[" * 100_000, "nested too deeply"),
        ("added_tokens", {"<a>": "259"}, "'<a>': expected an id of 0 or greater, got '259'"),
        ("added_tokens", {"<a>": -1}, "'<a>': expected an id of 0 or greater, got -1"),
        ("added_tokens", {"<a>": 5}, "expected id 5 for the added token '<a>', but the vocabulary has '&' there"),
        ("added_tokens", {"ab": 300}, "expected id 300 for the added token 'ab', but the vocabulary has 256 there"),
        ("special_tokens_map", [], "expected a JSON object"),
        ("special_tokens_map", {"eos_token": {}}, "eos_token: expected a token, got {}"),
        ("special_tokens_map", {"additional_special_tokens": 3}, "additional_special_tokens: expected a list"),
        ("special_tokens_map", {"additional_special_tokens": [3]}, r"additional_special_tokens\[0\]: expected a token"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder: expected ids and their tokens"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder: expected ids and their"),
        ("tokenizer_config", {"added_tokens_decoder": {"259": 1}}, r"added_tokens_decoder\[259\]: expected a token"),
        ("tokenizer_config", {"added_tokens_decoder": {"259": {"content": "<a>", "lstrip": 1}}}, "each property"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "add_bos_token: expected true or false, got 'yes'"),
        ("tokenizer_config", {"add_prefix_space": 1}, "add_prefix_space: expected true or false, got 1"),
        ("tokenizer_config", {"tokenizer_class": "CLIPTokenizer"}, "tokenizer_class: expected .* got 'CLIPTokenizer'"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, name: str, content: Any, message: str) -> None:
    write(tmp_path, **{name: content})
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path)
    assert f"{name}.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_before_a_text_that_the_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    vocab = {token: id for token, id in VOCAB.items() if id != END}
    with pytest.raises(CheckpointError, match=r"add_bos_token: expected '<.endoftext.>' in the vocabulary"):
        read(write(tmp_path, vocab, tokenizer_config={"add_bos_token": True}))


def test_an_added_token_elsewhere_in_a_whole_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: expected id 300 for the added token '<a>'"):
        read(write_whole(tmp_path, added_tokens={"<a>": 300}))
