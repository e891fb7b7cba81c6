"""The prefix cache over a restart: the same hits and texts, and no file that is not wholly right."""

import os
import signal
import subprocess
import sys
import time

import pseudo_terminal
import pytest
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
        pytest.raises(lj.EngineError, match="pages of 4 tokens"),
    ):
        engine.load_prefixes(path)
    with lj.Engine(model, **SIZES, codec="float16") as engine, pytest.raises(lj.EngineError, match="in float16"):
        engine.load_prefixes(path)


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
