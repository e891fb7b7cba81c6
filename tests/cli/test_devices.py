"""Commands on several devices, and by several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import pytest
import tiny
from devices import environment
from profiles import THOROUGH

import llorch_jax as lj
from llorch_jax.cli import app
from llorch_jax.cli.devices import LOST, parse_mesh, take_mesh

STOPS = [(1, signal.SIGSTOP)] if THOROUGH else []  # noticed after 20 seconds
COMMAND = [sys.executable, "-m", "llorch_jax"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    made = tiny.random_model(num_kv_heads=4)
    lj.save_model(path, made.config, made.params, made.tokenizer, overwrite=True)
    return ["--model", str(path)]


def start(*arguments, command="generate", **settings):
    env = {**environment(), "PYTHONWARNINGS": ""}
    line = [*COMMAND, command, *arguments]
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def start_two(*arguments):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = ["--coordinator", address, "--processes", "2"]
    return [start(*arguments, *together, "--process", str(number)) for number in range(2)]


def test_a_mesh_is_described_by_its_axes():
    assert parse_mesh("data=2,model=4") == {"data": 2, "model": 4}
    assert parse_mesh(" model = 3 ") == {"model": 3}
    for wrong in ("", "2", "data=0", "data=2,data=2", "rows=2", "data=2;model=2", "data=-1", "data=1.5"):
        with pytest.raises(lj.MeshError, match=r"data=N,model=N"):
            parse_mesh(wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1"}, "with the numbers processes and process"),
        ({"coordinator": "localhost", "processes": 2, "process": 0}, "HOST:PORT, got 'localhost'"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "process: expected"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 0, "mesh": "model=3"}, "2 processes, got 3"),
        ({"mesh": "data=1000"}, "at least 1000 devices"),
    ],
)
def test_refusals_name_what_was_expected(given, message):
    jax.devices()  # otherwise it would make a thousand
    with pytest.raises(lj.MeshError, match=message):
        take_mesh(given)


def test_a_command_on_a_mesh_prints_what_it_prints_on_one_device(model):
    one, two = (start(*model, "The old woman", "-n", "12", *mesh) for mesh in ((), ("--mesh", "data=1,model=2")))
    expected, got = (process.communicate(timeout=120) for process in (one, two))
    assert got == expected
    assert one.returncode == two.returncode == 0


def test_a_chat_on_a_mesh_says_what_it_says_on_one_device(model, tmp_path):
    turns = f"a fox\n/regenerate\n/save {tmp_path / 'a'}\nb\n/load {tmp_path / 'a'}\nc\n/quit\n"
    options = [*model, "-n", "6", "--temperature", "0.9", "--seed", "5"]
    one = start(*options, command="chat", stdin=subprocess.PIPE)
    expected = one.communicate(turns, timeout=120)
    two = start(*options, "--mesh", "model=2", command="chat", stdin=subprocess.PIPE)
    assert two.communicate(turns, timeout=120) == expected
    assert one.returncode == two.returncode == 0
    assert "loaded" in expected[1]
    assert len(expected[0].split()) > 4


def test_a_server_on_a_mesh_answers_as_on_one_device(model):
    expected = lj.generate(lj.load(model[1]), "a fox", max_new_tokens=12, temperature=0.9, seed=3).text
    options = ["--mesh", "data=1,model=2", "--port", "0", "--slots", "1", "--no-warm-up"]
    with start(model[1], *options, command="serve") as server:
        place = server.stdout.readline().split()[-1]
        body = {"prompt": "a fox", "max_tokens": 12, "temperature": 0.9, "seed": 3, "n": 2}
        with urllib.request.urlopen(f"{place}/v1/completions", json.dumps(body).encode(), timeout=120) as answer:
            choices = json.loads(answer.read())["choices"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert server.stderr.read() == ""
    assert choices[0]["text"] == expected
    assert choices[1]["text"] != expected


def test_devices_that_wait_for_each_other_leave_threads_to_compute_on(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Once upon a time there was fox number {n}, who"}}\n' for n in range(8)))
    outs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for out, mesh in zip(outs, ((), ("--mesh", "model=2")), strict=True):
        running = start("--file", str(prompts), "-n", "20", "--out", str(out), *mesh)
        assert running.communicate(timeout=100)[0] == ""
        assert running.returncode == 0
    one, two = ([json.loads(line)["text"] for line in out.read_text().splitlines()] for out in outs)
    assert one == two
    assert len(one) == 8


def test_two_processes_write_what_one_writes(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}", "seed": {len(text)}}}\n' for text in ("a b", "fox", "x", "y z")))
    alone, both = tmp_path / "alone.jsonl", tmp_path / "both.jsonl"
    options = [*model, "--file", str(prompts), "-n", "12", "--temperature", "0.8", "--mesh", "data=2,model=2"]
    first = start(*options, "--out", str(alone))
    assert first.communicate(timeout=120)[0] == ""
    running = start_two(*options, "--out", str(both))
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert both.read_bytes() == alone.read_bytes()
    assert both.read_text().count("\n") == 4
    assert said == [("", f"continued 4 prompts; all results are in {both}\n"), ("", "")]


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), *STOPS])
def test_a_process_ends_with_one_line_when_another_is_killed_or_stopped(model, victim, number):
    running = start_two(*model, "The old woman", "-n", "1000000", "--overflow", "reencode", "--mesh", "model=2")
    try:
        assert running[0].stdout.read(200)  # both generate
        os.kill(running[victim].pid, number)
        killed = time.monotonic()
        other = running[1 - victim]
        message = other.communicate(timeout=60)[1].strip()
        assert time.monotonic() - killed < 45
        assert other.returncode == 1
        assert message.startswith(f"error: {LOST}")
        assert "\n" not in message
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("given", [["--mesh", "model=2"], ["--coordinator", "localhost:1"], ["--process", "0"]])
def test_ray_and_a_mesh_are_not_combined(given, tmp_path, capfd):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "a"}\n')
    assert app.run(["generate", "--file", str(prompts), "--out", str(out), "--ray", "local", *given]) == 2
    assert f"expected no {given[0]} with it" in " ".join(capfd.readouterr().err.split())
    assert not out.exists()
