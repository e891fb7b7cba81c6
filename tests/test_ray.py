"""Many prompts on a Ray cluster, which these tests start and stop: what a local run gives, whatever dies."""

import importlib.util
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

import llorch_jax as lj
from llorch_jax.cli import app
from llorch_jax.errors import BatchFileError, ClusterError
from llorch_jax.text.batch_file import generate_file

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra ray is not installed", allow_module_level=True)

SETTINGS = {"max_new_tokens": 12, "temperature": 0.9, "top_logprobs": 2, "cache": "static"}
SEED = {"seed": 0}  # as the command line has it
COUNT = 24


@pytest.fixture(scope="module")
def model():
    return tiny.random_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A directory with the tiny model."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    lj.save_model(path, model.config, model.params, model.tokenizer)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of prompts with options of their own, which make batches of different sizes."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    own = [{"id": n, "max_new_tokens": 9} if n % 5 == 0 else {} for n in range(COUNT)]
    lines = [{"prompt": f"Tale {n:02}", "seed": n, **own[n]} for n in range(COUNT)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def local(model, source, tmp_path_factory):
    """What a run without Ray writes."""
    target = tmp_path_factory.mktemp("local") / "out.jsonl"
    generate_file(model, source, target, batch_size=2, **SETTINGS, **SEED)
    return target.read_bytes()


# A process of its own starts the cluster: Ray forks, which a process in which JAX runs must not.
CLUSTER = """
import ray, sys
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def settings():
    """Ray's settings, which it reads when it is imported: the cluster has a token that only these tests know."""
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster, to which this process is connected."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], text=True, **pipes)
    import ray.data

    try:
        address = process.stdout.readline().strip()
        assert address
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield address
        ray.shutdown()
    finally:
        process.communicate()  # the end of its input ends it, and with it the cluster


def from_items(rows):
    import ray.data

    return ray.data.from_items(rows)


def parts_of(target: Path) -> list[Path]:
    return sorted(target.glob("*.jsonl"))


def content_of(target: Path) -> bytes:
    return b"".join(path.read_bytes() for path in parts_of(target))


def actors() -> list[dict]:
    """The actors that continue lines, as the cluster knows them."""
    from ray._private.state import actors

    return [each for each in actors().values() if "LineActor" in each["ActorClassName"]]


def run(model, folder, source, target, count: int, **options) -> int:
    pool = lj.ray.Pool(count)
    return lj.ray.generate_file(
        model, lj.ray.Source.of(folder), source, target, batch_size=2, pool=pool, **SETTINGS, **SEED, **options
    )


def test_rows_get_what_each_prompt_gets_alone(cluster, model, folder):
    rows = [{"name": f"n{n}", "words": f"Tale {n}", "seed": n, "most": [n] * n} for n in range(5)]
    dataset = lj.ray.generate(
        from_items(rows),
        folder,
        prompt_column="words",
        option_columns=["seed"],
        batch_size=2,
        actors=1,
        **SETTINGS,
    )
    found = sorted(dataset.take_all(), key=lambda row: row["name"])
    for row, given in zip(found, rows, strict=True):
        alone = lj.generate(model, given["words"], seed=given["seed"], **SETTINGS)
        assert {name: row[name] for name in given} == given
        assert (row["text"], list(row["tokens"]), row["finish_reason"]) == (
            alone.text,
            alone.token_ids,
            alone.finish_reason,
        )
        assert list(row["logprobs"]) == pytest.approx(alone.logprobs, abs=1e-5)  # a batch's prefill has other last bits
        top = [[each["id"] for each in step] for step in row["top_logprobs"]]
        assert top == [[id for id, _ in step] for step in alone.top_logprobs]


def test_lines_are_those_of_a_local_run_with_an_actor_killed_midway(cluster, model, folder, source, local, tmp_path):
    target, killed = tmp_path / "results", []

    def kill() -> None:
        while not parts_of(target):
            time.sleep(0.005)
        victim = next(each for each in actors() if each["State"] == "ALIVE")
        os.kill(victim["Pid"], signal.SIGKILL)
        killed.append(len(parts_of(target)))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert run(model, folder, source, target, 2) == COUNT
    killer.join(5)
    assert 0 < killed[0] < len(parts_of(target))
    assert content_of(target) == local


def test_a_run_that_was_killed_resumes_with_another_number_of_actors(cluster, model, folder, source, local, tmp_path):
    target = tmp_path / "results"
    command = [sys.executable, "-m", "llorch_jax", "generate", "--file", source, "--out", target, "--model", folder]
    command += ["--batch-size", "2", "-n", "12", "--temperature", "0.9", "--top-logprobs", "2", "--ray", cluster]
    process = subprocess.Popen([*map(str, command), "--actors", "2"], stderr=subprocess.PIPE)
    while len(parts_of(target)) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.communicate()[1] == b""  # Ray announces the level of its log, unless it is kept from it
    assert process.returncode == -signal.SIGKILL
    assert len(content_of(target)) < len(local)
    assert 0 < run(model, folder, source, target, 1) < COUNT
    assert content_of(target) == local
    assert list(target.glob("checkpoint-*"))
    with pytest.raises(BatchFileError, match="results: expected results of this job with these settings, or none"):
        lj.ray.generate_file(model, lj.ray.Source.of(folder), source, target, max_new_tokens=3)


def test_other_content_of_the_directory_is_left(model, folder, source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(BatchFileError, match=r"expected results of this job with .*, or none, got notes.txt"):
            run(model, folder, source, tmp_path, 1, overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(BatchFileError, match=r"notes.txt: expected a directory or none"):
        run(model, folder, source, tmp_path / "notes.txt", 1)


def test_results_of_other_jobs_are_replaced_only_if_asked(tmp_path):
    from llorch_jax.ray_files import prepare

    (tmp_path / "000000000001.jsonl").write_text("{}")
    (tmp_path / "checkpoint-other").mkdir()
    with pytest.raises(BatchFileError, match="got checkpoint-other; name a new directory"):
        prepare(tmp_path, "job", overwrite=False)
    assert prepare(tmp_path, "job", overwrite=True) == tmp_path / "checkpoint-job"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "A"}], {}, "dataset: expected a column 'prompt', got 'text'"),
        ([{"prompt": "A", "text": "B"}], {}, "dataset: expected no column 'text', which the result has"),
        ([{"prompt": "A"}], {"top_q": 1}, "top_q: got an unknown option"),
        ([{"prompt": "A"}], {"model": "/nowhere"}, "'/nowhere' is no such directory"),
        ([{"prompt": "A"}], {"actors": 0}, "actors: expected 1 or more"),
        ([{"prompt": "A"}], {"actors": (2, 1)}, "actors: expected 1 or more, or the least and the most"),
        ([{"prompt": "A"}], {"cpus": 0}, "cpus: expected a number above 0"),
        ([{"prompt": "A"}], {"batch_size": 0}, "batch_size: expected"),
        ([{"prompt": "A"}], {"sampler": lj.Greedy()}, "sampler: expected none"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(cluster, rows, options, message):
    with pytest.raises(lj.LlorchError, match=message):
        lj.ray.generate(from_items(rows), **options)


def test_a_prompt_that_does_not_fit_is_named(cluster, folder):
    dataset = lj.ray.generate(from_items([{"prompt": "Once"}, {"prompt": ""}]), folder, actors=1, max_new_tokens=4)
    with pytest.raises(Exception, match=r"ClusterError: the row with the prompt '': .*at least one"):
        dataset.take_all()


def test_no_dataset(cluster):
    with pytest.raises(ClusterError, match=r"dataset: expected a ray.data.Dataset, got a list"):
        lj.ray.generate([{"prompt": "A"}])


class TestCommandLine:
    @pytest.fixture
    def run(self, capsys, folder, source, tmp_path):
        def command(*arguments) -> str:
            options = ["--file", source, "--out", tmp_path / "out", "--model", folder, *arguments]
            assert app.run(["generate", *map(str, options)]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            return line

        return command

    def test_an_address_without_a_cluster(self, run):
        assert "--ray: expected local, auto, or the address HOST:PORT" in run("--ray", "127.0.0.1:1", "-n", 4)
        assert "--ray: expected local, auto, or the address HOST:PORT" in run("--ray", "nonsense", "-n", 4)

    def test_the_hint_without_ray(self, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray.data", None)
        assert "install it with pip install 'llorch-jax[ray]'" in run("--ray", "local", "-n", 4)


def test_importing_the_package_does_not_import_ray():
    code = "import sys, llorch_jax; llorch_jax.generate, llorch_jax.ray; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
