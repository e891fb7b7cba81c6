import functools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from tokenizers import decoders, models, pre_tokenizers

import llorch_jax.tokenizer
from llorch_jax.errors import CheckpointError, TokenError
from llorch_jax.tokenizer import Tokenizer

ASSETS = Path(llorch_jax.tokenizer.__file__).parent / "assets" / "gpt2-bpe"
GPT2 = Tokenizer.gpt2()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # any character that UTF-8 can encode
AWKWARD = [
    "",
    "\0",
    " \n\t ",
    "don't  stop ,",
    "🎈👩‍👩‍👧‍👦🏳️‍🌈",
    "漢字かな한글",
    "e\u0301\u0327",
    "a\r\n\x85\u2028",
    "\ufeff\ufffd",
    "<|endoftext|>",
]


def fallback_tokenizer() -> Tokenizer:
    """As Llama's: sentencepiece words, and a token per byte where there is no word; `|` decodes to nothing."""
    words = ["|", "▁", "▁the", "▁cat", "s", ".", "é", "\ufffd"]
    vocab = {token: id for id, token in enumerate(["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    replace = [decoders.Replace("▁", " "), decoders.Replace("|", "")]
    backend.decoder = decoders.Sequence([*replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


def wordpiece_tokenizer() -> Tokenizer:
    vocab = {token: id for id, token in enumerate(["[UNK]", "do", "n", "##s", "##ing", "'", "t", ".", ",", "é"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return Tokenizer(backend)


def suffix_tokenizer(decoder: object = None) -> Tokenizer:
    vocab = {token: id for id, token in enumerate(["a", "b", "a</w>", "b</w>", "é</w>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>"))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend)


def added_tokenizer(decoder: object = None) -> Tokenizer:
    """GPT-2's with added tokens, whose symbols may or may not be in the alphabet of bytes."""
    backend = tokenizers.Tokenizer.from_str(GPT2._backend.to_str())
    backend.add_tokens(["ilÖveyou", "日本", "<pad>", "âĤ"])
    backend.add_special_tokens(["<|é|>", "<|終|>"])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend)


OTHERS = {
    "added": added_tokenizer,
    "bytes in a sequence": lambda: added_tokenizer(decoders.Sequence([decoders.ByteLevel()])),
    "byte fallback": fallback_tokenizer,
    "wordpiece": wordpiece_tokenizer,
    "suffix": lambda: suffix_tokenizer(decoders.BPEDecoder()),
    "no decoder": suffix_tokenizer,
}


@functools.cache
def named(name: str) -> Tokenizer:
    return GPT2 if name == "gpt2" else OTHERS[name]()


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    stream = tokenizer.stream(**options)
    once, again = ("".join([*(stream.push(id) for id in ids), stream.flush()]) for _ in range(2))
    assert once == again  # a flush leaves nothing behind
    return once


def copy_pair(folder: Path) -> Path:
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(ASSETS / name, folder / name)
    return folder


def test_known_ids() -> None:
    assert GPT2.encode("Hello.") == [15496, 13]
    assert GPT2.encode("Hello world") == [15496, 995]
    assert GPT2.encode(" Hello") == [18435]  # the space belongs to the token, none is added
    assert GPT2.encode("") == []
    assert GPT2.decode([15496, 13]) == "Hello."
    assert GPT2.vocab_size == 50257
    assert GPT2.eos_id == 50256


def test_tokens_by_name() -> None:
    assert GPT2.token_to_id("Ġworld") == 995
    assert GPT2.id_to_token(995) == "Ġworld"
    assert GPT2.token_to_id("no such token") is None


def test_special_tokens_follow_transformers_defaults() -> None:
    ids = GPT2.encode("a<|endoftext|>b")
    assert ids == [64, 50256, 65]
    assert GPT2.decode(ids) == "a<|endoftext|>b"
    assert GPT2.decode(ids, skip_special_tokens=True) == "ab"


@given(TEXTS)
def test_any_text_round_trips(text: str) -> None:
    assert GPT2.decode(GPT2.encode(text)) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_round_trips(text: str) -> None:
    ids = GPT2.encode(text)
    assert GPT2.decode(ids) == text
    assert streamed(GPT2, ids) == text


@pytest.mark.parametrize("kind", [np.int32, np.uint16, jnp.int32])
def test_ids_of_any_integer_dtype(kind: type) -> None:
    ids = GPT2.encode("Hello.")
    array = jnp.asarray(ids, kind) if kind is jnp.int32 else np.asarray(ids, kind)
    assert GPT2.decode(array) == "Hello."
    assert GPT2.stream().push(array[0]) == "Hello"
    assert GPT2.id_to_token(array[1]) == "."
    assert GPT2.decode(array[:0]) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"bytes", "text: expected a str, got bytes"),
        (None, "text: expected a str, got NoneType"),
        (["a"], "text: expected a str, got list"),
        ("ab\ud800", r"text: .*UTF-8.*got lone surrogate '\\ud800' at position 2"),
    ],
)
def test_bad_text(text: object, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        GPT2.encode(text)
    with pytest.raises(TokenError, match=message.replace("text:", "token:")):
        GPT2.token_to_id(text)


@pytest.mark.parametrize("id", [-1, 2**31, 2**32, 2**70, 1.0, "13", None, True])
def test_bad_id(id: object) -> None:
    stream = GPT2.stream()
    for call in (GPT2.id_to_token, GPT2.num_bytes, stream.push):
        with pytest.raises(TokenError, match=f"id: expected the id of a token, 0 or greater, got {id!r}"):
            call(id)


def test_an_id_without_a_token_has_no_name() -> None:
    with pytest.raises(TokenError, match="id: expected the id of one of the tokenizer's 50257 tokens, got 50257"):
        GPT2.id_to_token(50257)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([13, -1], r"ids\[1\]: expected the id of a token, 0 or greater, got -1"),
        ([2**40], r"ids\[0\]: expected .* got 1099511627776"),
        ([2**70], "ids: expected integers, got dtype object"),
        ([1.0], "ids: expected integers, got dtype float64"),
        ([True], "ids: expected integers, got dtype bool"),
        (["a"], "ids: expected integers, got dtype <U1"),
        (13, r"ids: expected integers of shape \[T\], got shape \[\]"),
        ([[13, 14]], r"ids: expected integers of shape \[T\], got shape \[1, 2\]"),
        ([[13, 14], [15]], "ids: .*rows of unequal length"),
    ],
)
def test_bad_ids(ids: object, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        GPT2.decode(ids)


@given(st.lists(st.integers(0, 50256)), st.booleans())
def test_stream_equals_decode(ids: list[int], skip: bool) -> None:
    assert streamed(GPT2, ids, skip_special_tokens=skip) == GPT2.decode(ids, skip_special_tokens=skip)


@examples(500)
@given(st.lists(st.sampled_from([*range(94, 256), 0, 50256])))  # mostly single bytes beyond ASCII, seldom valid UTF-8
def test_stream_equals_decode_on_invalid_bytes(ids: list[int]) -> None:
    assert streamed(GPT2, ids) == GPT2.decode(ids)


@given(TEXTS)
def test_stream_never_shows_half_a_character(text: str) -> None:
    ids, stream, shown = GPT2.encode(text), GPT2.stream(), ""
    for count, id in enumerate(ids, start=1):
        shown += stream.push(id)
        assert text.startswith(shown)
        complete = GPT2.decode(ids[:count]).rstrip("\ufffd")  # and nothing complete is held back
        assert len(shown) >= len(complete)
    assert stream.flush() == ""


def test_stream_holds_back_and_flushes() -> None:
    first, *rest = GPT2.encode("🎈")
    stream = GPT2.stream()
    assert stream.push(first) == ""
    assert "".join(stream.push(id) for id in rest) == "🎈"
    stream.push(first)
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(rest[-1]) == "\ufffd"  # a fresh sequence: no byte is left of the one before


def test_stream_survives_a_bad_id() -> None:
    first, *rest = GPT2.encode("🎈")
    stream = GPT2.stream()
    stream.push(first)
    with pytest.raises(TokenError):
        stream.push(-1)
    assert "".join(stream.push(id) for id in rest) == "🎈"


@pytest.mark.parametrize("name", ["gpt2", *OTHERS])
def test_ids_without_a_token_decode_to_nothing(name: str) -> None:
    tokenizer = named(name)
    unknown = [tokenizer.vocab_size, tokenizer.vocab_size + 50, 2**31 - 1]
    for ids in ([0, 1], tokenizer.encode("ab") if name not in ("wordpiece",) else [1, 3]):
        mixed = [unknown[0], ids[0], unknown[1], *ids[1:], unknown[2]]
        assert tokenizer.decode(mixed) == tokenizer.decode(ids) == streamed(tokenizer, mixed)
    assert tokenizer.num_bytes(unknown[0]) == 0
    first, *rest = GPT2.encode("🎈")
    assert GPT2.decode([first, 50257, *rest]) == streamed(GPT2, [first, 60000, *rest]) == "🎈"


@pytest.mark.parametrize("name", ["gpt2", *OTHERS])
def test_ids_are_those_that_have_a_token(name: str) -> None:
    tokenizer = named(name)
    ids = tokenizer.ids()
    assert ids.dtype == np.int32
    assert len(ids) == tokenizer.vocab_size
    assert (np.diff(ids) > 0).all()
    assert [tokenizer.token_to_id(tokenizer.id_to_token(int(id))) for id in ids[-9:]] == ids[-9:].tolist()


@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), decoders.Sequence([decoders.ByteLevel()])])
def test_added_tokens_of_symbols_of_bytes_are_their_letters(decoder: object) -> None:
    backend = tokenizers.Tokenizer.from_str(GPT2._backend.to_str())
    backend.decoder = decoder
    backend.add_tokens(["café", "Ġcafé", "Ċ¡", "nichts"])
    tokenizer = Tokenizer(backend)
    for text in ("a café b", "caféĠcafé", "Ċ¡ Ċ", "café", "das nichts nichtet", "é caf"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text == streamed(tokenizer, ids)
        assert sum(map(tokenizer.num_bytes, ids)) == len(text.encode())
    assert tokenizer.num_bytes(tokenizer.token_to_id("café")) == 5


@pytest.mark.parametrize("added", ["é", "Ġthe"])
def test_an_added_token_that_the_vocabulary_spells_alike_is_refused(added: str, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(GPT2._backend.to_str())
    backend.add_tokens([added])
    with pytest.raises(TokenError, match=f"added token '{added}': expected one that the vocabulary does not spell"):
        Tokenizer(backend)
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=f"added token '{added}'"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_stream_equals_decode_for_other_tokenizers(name: str) -> None:
    tokenizer = named(name)
    size = tokenizer.vocab_size
    tail = st.integers(max(0, size - 12), size - 1)  # where the words and the added tokens are

    @examples(200)
    @given(st.lists(st.integers(0, size - 1) | tail), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert streamed(tokenizer, ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


def test_byte_fallback_streams_word_by_word() -> None:
    tokenizer = named("byte fallback")
    ids = [tokenizer.token_to_id(token) for token in ("▁the", "|", "▁cat", "<0xE2>", "<0x82>", "<0xAC>", "s", "▁the")]
    stream = tokenizer.stream()
    assert [stream.push(id) for id in ids] == ["the", "", " cat", "", "", "", "€s", " the"]


def test_bytes_in_a_sequence_stream_whole_characters() -> None:
    tokenizer = named("bytes in a sequence")
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in tokenizer.encode("a🎈日本🎈")]
    assert [piece for piece in pieces if piece] == ["a", "🎈", "日本", "🎈"]


def test_window_of_a_stream_stays_small() -> None:
    tokenizer = named("wordpiece")
    stream = tokenizer.stream()
    for _ in range(100):
        stream.push(tokenizer.token_to_id("do"))
    assert len(stream._ids) == 1


def test_directory_with_the_pair(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(str(copy_pair(tmp_path)))
    assert tokenizer._backend.to_str() == GPT2._backend.to_str()


def test_pair_without_end_of_text(tmp_path: Path) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {symbol: id for id, symbol in enumerate([*sorted(alphabet), "ab", "Ġab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_bytes("#version: 0.2\r\na b\r\nĠ ab\r\n".encode())
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.eos_id is None
    assert tokenizer.vocab_size == 258
    assert tokenizer.encode("ab ab") == [256, 257]
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>é")) == "<|endoftext|>é"


@pytest.mark.parametrize("name", ["gpt2", *OTHERS])
def test_save_then_load(name: str, tmp_path: Path) -> None:
    tokenizer = named(name)
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.from_directory(tmp_path / "new" / "folder")
    assert loaded._backend.to_str() == tokenizer._backend.to_str()
    assert loaded.eos_id == tokenizer.eos_id
    assert type(loaded.stream()) is type(tokenizer.stream())


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    named("added").save(copy_pair(tmp_path))
    assert Tokenizer.from_directory(tmp_path).vocab_size == named("added").vocab_size > 50257


def test_truncation_and_padding_of_a_file_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(GPT2._backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five"
    assert Tokenizer.from_directory(tmp_path).encode(text) == GPT2.encode(text)


def test_post_processor_adds_nothing(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(GPT2._backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "<|endoftext|> $A", None, [("<|endoftext|>", 50256)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path).encode("Hello.") == [15496, 13]


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(tmp_path) is None


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: expected a model directory"):
        Tokenizer.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_pair(missing: str, tmp_path: Path) -> None:
    (copy_pair(tmp_path) / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing}: missing"):
        Tokenizer.from_directory(tmp_path)


SMALL = '{"a": 0, "b": 1, "ab": 2}'


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (SMALL[:-1], "a b", "vocab.json: expected JSON"),
        (b"\xff", "a b", "vocab.json: expected JSON"),
        ("[]", "a b", "vocab.json: expected a JSON object of tokens"),
        ("{}", "a b", "vocab.json: expected a JSON object of tokens"),
        ('{"a": "0"}', "", "vocab.json: expected distinct ids .* got '0' for token 'a'"),
        ('{"a": true}', "", "vocab.json: expected distinct ids .* got True for token 'a'"),
        ('{"a": -1}', "", "vocab.json: expected distinct ids .* got -1 for token 'a'"),
        ('{"a": 4294967296}', "", "vocab.json: expected distinct ids .* got 4294967296 for token 'a'"),
        ('{"a": 0, "b": 0}', "", "vocab.json: expected distinct ids .* got 0 for token 'b'"),
        (SMALL, b"\xff\xfe", "merges.txt: expected UTF-8"),
        (SMALL, "#version: 0.2\na b\na b c", "merges.txt, line 3: expected two tokens .* got 'a b c'"),
        (SMALL, "ab", "merges.txt, line 1: expected two tokens .* got 'ab'"),
        (SMALL, "a x", "merges.txt, line 1: expected two tokens .* got 'a x'"),
        (SMALL, "b a", "merges.txt, line 1: expected two tokens .* got 'b a'"),
    ],
)
def test_broken_pair(vocab: str | bytes, merges: str | bytes, message: str, tmp_path: Path) -> None:
    for name, content in (("vocab.json", vocab), ("merges.txt", merges)):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(tmp_path)


PANICS = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}


@pytest.mark.parametrize("content", ["", "{}", "[]", "\0", SMALL, "version https://git-lfs", json.dumps(PANICS)])
def test_broken_tokenizer_json(content: str, tmp_path: Path) -> None:
    (copy_pair(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer of the `tokenizers` library"):
        Tokenizer.from_directory(tmp_path)


def test_characters_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(SMALL[:-1] + ', "<|endoftext|>": 3}')
    (tmp_path / "merges.txt").write_text("a b\n")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("abba<|endoftext|>") == [2, 1, 0, 3]
    with pytest.raises(TokenError, match=r"text: expected characters .* vocabulary covers, got 'xé'"):
        tokenizer.encode("abxéb")


def test_what_the_library_cannot_encode() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")))
    with pytest.raises(TokenError, match="text: expected text that the tokenizer can encode"):
        tokenizer.encode("b")
