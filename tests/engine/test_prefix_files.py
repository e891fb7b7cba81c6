"""The prefix cache over a restart: the same hits and texts, and no file that is not wholly right."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pseudo_terminal
import pytest
from archives import edit
from tiny import random_model

import llorch_jax as lj

TEXT = "the same beginning of many texts"  # 32 tokens: four pages
SIZES = {"slots": 1, "page_size": 8}


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module", params=[None, "int8"])
def codec(request):
    return request.param


@pytest.fixture(scope="module")
def engine(model, codec):
    """It is never given a request."""
    with lj.Engine(model, **SIZES, codec=codec) as engine:
        yield engine


@pytest.fixture(scope="module")
def saved(model, codec, tmp_path_factory):
    path = tmp_path_factory.mktemp("prefixes") / "prefixes"
    with lj.Engine(model, **SIZES, codec=codec) as engine:
        text = engine.submit(TEXT, max_new_tokens=4).result(120).text
        engine.submit(TEXT[:16] + "others", max_new_tokens=1, cache_salt="mine").result(60)
        assert engine.save_prefixes(path) == 6
    return path, text


def test_a_restarted_engine_finds_what_was_cached(model, codec, saved):
    path, text = saved
    with lj.Engine(model, **SIZES, codec=codec) as engine:
        assert engine.load_prefixes(path) == 6
        assert engine.submit(TEXT, max_new_tokens=4).result(120).text == text
        assert engine.stats().cached_tokens == 24
        engine.submit(TEXT[:16] + "others", max_new_tokens=1).result(60)
        assert engine.stats().cached_tokens == 24 + 16
        engine.submit(TEXT[:16] + "others", max_new_tokens=1, cache_salt="mine").result(60)
        assert engine.stats().cached_tokens == 24 + 16 + 16
        engine.inspect(lambda core: core.pages.check([]))
        assert engine.load_prefixes(path) == 0


def test_where_fewer_pages_are_free_beginnings_are_kept(model, codec, saved):
    with lj.Engine(model, **SIZES, codec=codec, num_pages=5) as engine:
        assert engine.load_prefixes(saved[0]) == 5
        engine.submit(TEXT, max_new_tokens=1).result(120)
        assert engine.stats().cached_tokens == 24
        engine.inspect(lambda core: core.pages.check([]))


def test_other_files_are_refused_and_change_nothing(model, codec, saved, tmp_path):
    path, _ = saved
    damaged, other = tmp_path / "damaged", tmp_path / "other"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    damaged.write_bytes(data)
    other.write_text("something else")
    with lj.Engine(model, **SIZES, codec=codec) as engine:
        for file, message in (
            (damaged, "checksum"),
            (other, "expected a saved prefix cache"),
            (tmp_path / "no", "no such file|missing"),
        ):
            with pytest.raises(lj.EngineError, match=f"(?i){message}"):
                engine.load_prefixes(file)
        assert engine.stats().pages.indexed == 0
        with pytest.raises(lj.EngineError, match="written"):
            engine.save_prefixes(tmp_path / "none" / "prefixes")


def test_files_of_other_models_and_engines_are_refused(model, codec, saved):
    path, _ = saved
    with (
        lj.Engine(random_model(n_layer=1), **SIZES, codec=codec) as engine,
        pytest.raises(lj.EngineError, match="fingerprint"),
    ):
        engine.load_prefixes(path)
    with (
        lj.Engine(model, slots=1, page_size=4, codec=codec) as engine,
        pytest.raises(lj.EngineError, match="tokens: expected pages of 4 tokens, as in the engine, got 8"),
    ):
        engine.load_prefixes(path)
    with (
        lj.Engine(model, **SIZES, codec="float16") as engine,
        pytest.raises(lj.EngineError, match="codec: expected 'float16' for a head_dim of 8, as in the engine, got"),
    ):
        engine.load_prefixes(path)


def fields(about):
    return about["content"]["fields"]


def items(about, name):
    return fields(about)[name]["items"]


def leaf(about, name="keys"):
    """The description of the first array of keys or values."""
    first = items(about, name)[0]
    return first["items"][0] if "items" in first else first


def set_digest(change):
    return lambda about, tensors: items(about, "digests")[1].update(value=change(items(about, "digests")[1]["value"]))


def set_token(number):
    def change(about, tensors):
        tokens = tensors[fields(about)["tokens"]["tensor"]].view(np.int32)
        tokens[3] = number

    return change


def regroup(description):
    """A page fewer, of more elements."""
    pages, heads, size, elements = description["shape"]
    description["shape"] = [pages // 2, heads, size, 2 * elements]


def first_as_tuple(about, tensors):
    """A plain tuple with the layer's arrays in place of what the codec stores."""
    first = items(about, "keys")[0]
    items(about, "keys")[0] = {"tuple": "tuple", "items": first.get("items", [first])}


EDITED = {
    "a digest of other letters": (
        set_digest(lambda old: "g" + old[1:]),
        r"digests\[1\]: expected 32 hexadecimal .* 'g",
    ),
    "a digest with spaces": (set_digest(lambda old: f" {old[2:]} "), r"digests\[1\]: expected 32 hexadecimal"),
    "a digest of capitals": (set_digest(lambda old: "A" * 32), r"digests\[1\]: expected 32 hexadecimal .* 'AAA"),
    "a short digest": (set_digest(lambda old: old[:-2]), r"digests\[1\]: expected 32 hexadecimal"),
    "a number for a digest": (set_digest(lambda old: 5), "Prefixes.digests"),
    "the same digest twice": (
        lambda about, tensors: items(about, "digests")[2].update(items(about, "digests")[0]),
        r"digests\[2\]: expected another digest for each page, got \w{32} twice",
    ),
    "a digest too few": (
        lambda about, tensors: items(about, "digests").pop() and None,
        r"tokens: expected int32 \[5, 8\], a page for each digest, got int32 \[6, 8\]",
    ),
    "no digests": (lambda about, tensors: items(about, "digests").clear(), r"tokens: expected int32 \[0, 8\]"),
    "a token below 0": (set_token(-1), r"tokens\[0, 3\]: expected 0 .. 256, got -1"),
    "a token outside the vocabulary": (set_token(257), r"tokens\[0, 3\]: expected 0 .. 256, got 257"),
    "fractions for tokens": (lambda a, t: fields(a)["tokens"].update(dtype="float32"), "tokens: expected int32"),
    "a row of tokens": (
        lambda a, t: fields(a)["tokens"].update(shape=[48]),
        r"tokens: expected int32 .* got int32 \[48\]",
    ),
    "no axes": (
        lambda a, t: fields(a).update(tokens={"tensor": "one", "dtype": "int32", "shape": []}) or t.update(one=ONE),
        r"tokens: expected int32 .* got int32 \[\]",
    ),
    "random keys for tokens": (
        lambda a, t: fields(a).update(
            tokens={"keys": {**fields(a)["tokens"], "dtype": "uint32", "shape": [6, 4, 2]}, "impl": "threefry2x32"}
        ),
        "tokens: expected",
    ),
    "a layer too few": (lambda a, t: items(a, "values").pop() and None, "values: expected 2 layers, .*, got 1"),
    "a layer too many": (
        lambda a, t: items(a, "keys").append(items(a, "keys")[0]),
        "keys: expected 2 layers, .*, got 3",
    ),
    "no layers": (lambda a, t: items(a, "keys").clear(), "keys: expected 2 layers, as in the engine, got 0"),
    "a number for a layer": (lambda a, t: items(a, "keys").__setitem__(0, {"value": 5}), r"keys\[0\]: expected arrays"),
    "nothing for a layer": (
        lambda a, t: items(a, "keys").__setitem__(1, {"value": None}),
        r"keys\[1\]: expected .* got",
    ),
    "a plain tuple for a layer": (first_as_tuple, r"keys\[0\]: expected .* got tuple of"),
    "other pages": (lambda a, t: regroup(leaf(a)), r"keys\[0\]: expected .*\[6, 2, 8, 8\].* got .*\[3, 2, 8, 16\]"),
    "no axes in a layer": (
        lambda a, t: leaf(a, "values").update(tensor="one", dtype="int32", shape=[]) or t.update(one=ONE),
        r"values\[0\]: expected .*, got .*int32 \[\]",
    ),
    "a codec of another width": (
        lambda a, t: fields(a)["codec"]["fields"]["head_dim"].update(value=0),
        "codec: expected .* for a head_dim of 8, as in the engine, got .* for a head_dim of 0",
    ),
    "a text for a width": (
        lambda a, t: fields(a)["codec"]["fields"]["head_dim"].update(value="8"),
        "Codec.head_dim: expected int, got '8'",
    ),
}
ONE = np.zeros(4, np.uint8)


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_file_with_the_right_checksum_is_refused_and_changes_nothing(engine, saved, tmp_path, name):
    change, message = EDITED[name]
    path = tmp_path / "edited"
    path.write_bytes(saved[0].read_bytes())
    edit(path, change)
    with pytest.raises(lj.EngineError, match=message) as caught:
        engine.load_prefixes(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert engine.stats().pages.indexed == 0
    engine.inspect(lambda core: core.pages.check([]))


def test_an_unchanged_copy_is_taken(model, codec, saved, tmp_path):
    """So what the edits above are refused for is what they change."""
    path = tmp_path / "copy"
    path.write_bytes(saved[0].read_bytes())
    edit(path, lambda about, tensors: None)
    with lj.Engine(model, **SIZES, codec=codec) as engine:
        assert engine.load_prefixes(path) == 6


CODE = """
import sys
sys.path.insert(0, sys.argv[2])
import llorch_jax as lj
from tiny import random_model
with lj.Engine(random_model(), slots=1, page_size=8) as engine:
    engine.load_prefixes(sys.argv[1])
    print("ready", flush=True)
    while True:
        engine.save_prefixes(sys.argv[1])
"""


def test_killing_a_process_that_saves_loses_nothing(model, codec, saved, tmp_path):
    if codec is not None:
        pytest.skip("the same file format")
    path = tmp_path / "prefixes"
    path.write_bytes(saved[0].read_bytes())
    command = [sys.executable, "-c", CODE, str(path), os.path.dirname(pseudo_terminal.__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    with lj.Engine(model, **SIZES) as engine:
        assert engine.load_prefixes(path) == 6
