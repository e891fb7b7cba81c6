"""The server on a Ray cluster of these tests: who answers, streams, and what happens when one dies."""

import asyncio
import json
import secrets
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiny
from devices import environment
from starlette.requests import Request

import llorch_jax as lj
from llorch_jax.errors import ClusterError

# Importing ray.serve here would import Ray before test_ray has set what Ray reads when it is imported.
pytest.importorskip("mmh3", reason="the extra ray-serve is not installed")
httpx = pytest.importorskip("httpx2")

BEGINNING = "a b c d e f " * 30  # more than the characters that count
REQUEST = {"prompt": "a fox", "max_tokens": 50, "temperature": 0.9, "seed": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replicas": 0}, "replicas: expected"),
        ({"doors": 1.5}, "doors: expected"),
        ({"prefix_chars": 0}, "prefix_chars: expected"),
        ({"cpus": 0}, "cpus: expected"),
        ({"max_body": 0}, "max_body: expected"),
        ({"api_key": ""}, "api_key: expected"),
        ({"slot": 3}, r"slot: expected a setting of the engine \(slots, .*\), got an unknown one"),
        ({"slots": 0}, "slots: expected"),
        ({"codec": "int3"}, "codec"),
        ({"model": "no/such/model/here"}, "no/such/model/here"),
    ],
)
def test_refusals_name_what_was_expected(given, message):
    with pytest.raises(lj.LlorchError, match=message) as found:
        lj.ray_serve.app(**given)
    assert "\n" not in str(found.value)


def test_settings_are_those_of_the_engine():
    assert lj.ray_serve.app(offload_bytes=0, num_pages=None, codec="int8", page_size=8)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmh3", None)
    with pytest.raises(ClusterError, match="the extra `ray-serve`, got no mmh3"):
        lj.ray_serve.app()


def test_a_session_stands_for_the_beginning_of_a_prompt_or_of_messages():
    from llorch_jax.ray_replicas import session_of

    def session(**fields):
        return session_of(json.dumps(fields).encode(), 64)

    assert session(prompt=BEGINNING + "x") == session(prompt=BEGINNING + "y", seed=3) != session(prompt="y")
    assert session(prompt=[5] * 99) == session(prompt=[5] * 99 + [6])
    system = {"role": "system", "content": BEGINNING}
    assert session(messages=[system]) == session(messages=[system, {"role": "user", "content": "x"}])
    nothing = (b"", b"{", b"[1]", b"3", b"{}", b"\xff", b"[" * 100_000)
    assert [session_of(body, 64) for body in nothing] == [""] * len(nothing)


def test_a_replica_with_more_than_its_share_is_asked_last():
    from llorch_jax.ray_replicas import PrefixRouter

    def order(under_way, session):
        router = PrefixRouter.__new__(PrefixRouter)
        ids = list(range(len(under_way)))
        router._replicas = {id: SimpleNamespace(replica_id=id) for id in ids}
        router._replica_queue_len_cache = dict(enumerate(under_way))
        router._lookup_ranked_replicas = lambda key: ids
        about = SimpleNamespace(session_id=session, internal_request_id="x")
        request = SimpleNamespace(metadata=about, routing_context=SimpleNamespace())
        found = asyncio.run(router.choose_replicas(list(router._replicas.values()), request))
        return [rank[0].replica_id for rank in found]

    assert order([0, 0, 0], "s") == [0, 1, 2]
    assert order([2, 1, 1], "s") == [0, 1, 2]  # with this one 3 of 5, at most ceil(1.25 * 5 / 3)
    assert order([3, 1, 1], "s") == [1, 2, 0]
    assert order([3, 3, 0], "s") == [2, 0, 1]
    assert order([None, 5, 0], "s") == [0, 2, 1]
    assert order([2, 1, 0], "") == [2, 1, 0]


class Dying:
    """A deployment handle whose replicas send so many messages each, and die."""

    def __init__(self, *counts):
        self.counts = list(counts)
        self.cancelled = 0

    def options(self, **_):
        return self

    def remote(self, scope, body):
        return self

    def cancel(self):
        self.cancelled += 1

    async def __aiter__(self):
        from ray.exceptions import RayActorError

        start = {"type": "http.response.start", "status": 200, "headers": []}
        body = [{"type": "http.response.body", "body": b"%d" % n, "more_body": n < 3} for n in range(4)]
        count = self.counts.pop(0)
        for message in [start, *body][:count]:
            yield message
        if count < 5:
            raise RayActorError


@pytest.mark.parametrize(
    ("counts", "status", "end"),
    [
        ((5,), 200, b"0123"),
        ((0, 1, 5), 200, b"0123"),  # repeated, since there was nothing but the start
        ((0, 1, 0, 5), 503, b"have died"),
        ((3, 5), 200, b"has died"),
    ],
)
def test_a_request_is_repeated_where_nothing_of_the_answer_is_lost(counts, status, end):
    from llorch_jax.ray_replicas import Door

    sent, handle = [], Dying(*counts)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def relay():
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "app": object()}
        answer = await Door(handle, 100, 64)(Request(scope, receive))
        await answer(scope, receive, send)

    asyncio.run(relay())
    assert [each["type"] for each in sent].count("http.response.start") == 1
    assert sent[0]["status"] == status
    assert end in b"".join(each.get("body", b"") for each in sent)
    assert not sent[-1].get("more_body")
    assert handle.cancelled == min(len(counts), 3) - (counts[0] == 3)


# A process of its own starts the cluster: Ray forks, which a process in which JAX runs must not.
CLUSTER = """
import ray, sys
from ray import serve
import llorch_jax as lj
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])}, logging_config={"log_level": "ERROR"})
options = dict(replicas=2, doors=1, warm_up=False, prefix_chars=20, slots=2, page_size=8, api_key="key")
serve.run(lj.ray_serve.app(sys.argv[1], **options), logging_config={"log_level": "ERROR"})
print("ready", flush=True)
for line in sys.stdin:
    ray.kill(ray.get_actor(f"SERVE_REPLICA::default#Replica#{line.strip()}", namespace="serve"))
serve.shutdown()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A client of the tiny model's server, with the process that started it, which kills replicas by their names."""
    made = tiny.random_model()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lj.save_model(folder, made.config, made.params, made.tokenizer)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Ray gives its agent 15 seconds to start, which a busy machine may not have.
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_agent_register_timeout_ms": "120000", "RAY_AUTH_MODE": "token"}
    env = {**environment(), **own, "RAY_AUTH_TOKEN": secrets.token_hex(16), "PYTHONWARNINGS": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", CLUSTER, str(folder), str(port)], env=env, text=True, **pipes)
    try:
        assert process.stdout.readline().strip() == "ready"
        about = {"timeout": 120, "headers": {"authorization": "Bearer key"}}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", **about) as client:
            yield SimpleNamespace(client=client, process=process)
    finally:
        process.communicate()  # the end of its input ends it, and with it the cluster


def sessions(client):
    """A session of each replica, by the replica's name."""
    found = {}
    while len(found) < 2:
        name = secrets.token_hex(4)
        found[client.get("/v1/models", headers={"x-session-id": name}).headers["x-replica"]] = name
    return found


def test_requests_that_begin_alike_are_answered_by_one_replica_from_its_prefix_cache(server):
    for number in range(6):
        begin = f"Tale {number} of the old woman who"
        answers = [server.client.post("/v1/completions", json={"prompt": begin + who}) for who in ("", " saw", " ate")]
        assert [each.status_code for each in answers] == [200] * 3
        assert len({each.headers["x-replica"] for each in answers}) == 1
        usage = [each.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for each in answers]
        assert usage == [0, 24, 24]  # whole pages


def test_answers_are_those_of_the_server_and_streams_come_in_parts(server):
    expected = lj.generate(tiny.random_model(), "a fox", max_new_tokens=30, temperature=0.9, seed=3)
    body = {**REQUEST, "max_tokens": 30}
    whole = server.client.post("/v1/completions", json=body).json()
    assert whole["choices"][0]["text"] == expected.text
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(texts) == expected.text
    assert len(texts) > 10
    refused = server.client.post("/v1/completions", json=body, headers={"authorization": "Bearer no"})
    assert refused.status_code == 401
    assert "API key" in refused.json()["error"]["message"]
    assert server.client.post("/v1/completions", content=b"x" * (1 << 20) + b"y").status_code == 413


def test_a_client_that_goes_ends_its_request(server):
    name = next(iter(sessions(server.client).values()))
    about = {"x-session-id": name}

    def cancelled():
        lines = server.client.get("/metrics", headers=about).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith("llorch_cancelled_total"))

    before = cancelled()
    body = {**REQUEST, "n": 60, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body, headers=about) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 60
    while cancelled() == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_a_killed_replica_was_to_answer_another_one_answers(server):
    expected = lj.generate(tiny.random_model(), "a fox", max_new_tokens=50, temperature=0.9, seed=3).text
    victim, name = next(iter(sessions(server.client).items()))
    body = {**REQUEST, "n": 60}
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(server.client.post, "/v1/completions", json=body, headers={"x-session-id": name})
        time.sleep(0.1)
        print(victim, file=server.process.stdin, flush=True)
        answer = asked.result()
    assert answer.status_code == 200
    assert answer.headers["x-replica"] != victim
    assert answer.json()["choices"][0]["text"] == expected
    for number in range(5):
        assert server.client.post("/v1/completions", json={"prompt": f"{number}"}).status_code == 200
