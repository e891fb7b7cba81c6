"""The server as a process of its own: how it starts, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pseudo_terminal
import pytest
import tiny

import llorch_jax as lj
from llorch_jax.serve.app import Settings
from llorch_jax.serve.run import serve

PROMPT = "the cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny.random_model()
    path = tmp_path_factory.mktemp("models") / "tiny"
    lj.save_model(path, model.config, model.params, model.tokenizer)
    return str(path)


def start(folder, *options):
    command = [sys.executable, "-m", "llorch_jax", "serve", folder, "--port", "0", "--no-warm-up", *options]
    environment = pseudo_terminal.environment(**{k: v for k, v in os.environ.items() if k.startswith("JAX_")})
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_answers_what_is_under_way_after_sigterm_and_ends_with_0(folder):
    with start(folder, "--name", "mine", "--slots", "2", "--weights", "int8") as server:
        line = server.stdout.readline()
        assert line.startswith("serving mine at http://127.0.0.1:")
        body = json.dumps({"prompt": PROMPT, "max_tokens": 57, "temperature": 0, "stream": True}).encode()
        with urllib.request.urlopen(f"{line.split()[-1]}/v1/completions", body, timeout=60) as answer:
            first = answer.readline()
            server.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert first.startswith(b"data: ")
        assert rest.count("data: ") == 57
        assert rest.endswith("data: [DONE]\n\n")
        assert server.wait(60) == 0
        assert server.stderr.read() == ""


def test_an_address_of_ipv6_is_shown_as_in_a_url(folder):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    with start(folder, "--host", "::1") as server:
        line = server.stdout.readline()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert re.fullmatch(r"serving tiny at http://\[::1\]:\d+\n", line)


@pytest.mark.parametrize(
    ("host", "place"),
    [("2001:db8::1", "[2001:db8::1]:80"), ("a" * 64, "a" * 64 + ":80"), ("192.0.2.1", "192.0.2.1:80")],
)
def test_where_it_cannot_listen_the_engine_is_closed(host, place):
    with lj.Engine(tiny.random_model(), slots=1, page_size=8) as engine:
        with pytest.raises(lj.EngineError, match=f"cannot listen on {re.escape(place)} "):
            serve(engine, Settings("tiny"), host, 80, 1.0)
        with pytest.raises(lj.EngineError, match="closed"):
            engine.stats()


def test_where_the_template_is_damaged_the_engine_is_closed(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{")
    found = tiny.random_model()
    with lj.Engine(
        lj.Model(found.config, found.params, found.tokenizer, "tiny", tmp_path), slots=1, page_size=8
    ) as engine:
        with pytest.raises(lj.CheckpointError, match="chat template"):
            serve(engine, Settings("tiny"), "127.0.0.1", 0, 1.0)
        with pytest.raises(lj.EngineError, match="closed"):
            engine.stats()


def test_a_second_signal_ends_it_at_once(folder):
    with start(folder, "--drain-seconds", "1") as server:
        server.stdout.readline()
        server.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0"),
        (["--slots", "0"], "--slots: expected a whole number"),
        (["--codec", "int3"], "--codec: expected one of"),
        (["--api-key", ""], "--api-key: expected a key that is not empty"),
        (["--max-body", "0"], "--max-body: expected a whole number"),
        (["--drain-seconds", "0"], "--drain-seconds: expected seconds above 0"),
        (
            ["--offload-bytes", "1 page"],
            "--offload-bytes: expected a number of bytes such as 500MB, 1.5GiB or 0, got '1 p",
        ),
        (["--offload-bytes", "1kB"], "--offload-bytes: expected 0, or at least a page of "),
        (["--prefix-cache", "a" * 300], "cannot be read (File name too long)"),
    ],
)
def test_bad_settings_are_told_in_one_line(folder, capfd, monkeypatch, options, message):
    from llorch_jax.cli import app, interrupts, loading

    monkeypatch.setattr(loading, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(interrupts, "give_back", lambda: None)
    assert app.run(["serve", folder, "--port", "0", "--no-warm-up", *options]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


def test_without_the_extra_it_says_what_to_install(folder, capfd, monkeypatch):
    from llorch_jax.cli import app

    for name in [name for name in sys.modules if name.startswith("llorch_jax.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert app.run(["serve", folder]) == 1
    assert "expected the extra `serve`, got no uvicorn" in capfd.readouterr().err
