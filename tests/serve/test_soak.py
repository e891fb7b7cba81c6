"""Random requests over HTTP from many threads: none lost, none repeated, none wrong, nothing leaked."""

import gc
import http.client
import itertools
import json
import random
import socket
import threading
import time
from pathlib import Path

import jax
from profiles import whole
from servers import Running
from tiny import random_model

import llorch_jax as lj
from llorch_jax.serve.app import Settings
from llorch_jax.text.constrained.matching import can_constrain

REQUESTS = whole(5_000, quick=150)
SLOTS, PAGES = whole(3, quick=2), whole(14, quick=10)  # programs for another number of slots take seconds to compile
THREADS = 6
BEGINNING = "the cat sat on the mat"
OPTIONS = (
    {"temperature": 0},
    {"temperature": 0.9, "top_k": 20},
    {"temperature": 0.8, "presence_penalty": 0.4},
    *([{"temperature": 0.9, "regex": "[a-m]{2,5}-[0-9]{3}"}] if can_constrain() else []),
)
JOBS = [
    {"prompt": BEGINNING[:shared] + own, "max_tokens": new, "seed": seed, **options}
    for seed, (shared, own, new, options) in enumerate(
        itertools.product((0, 9, 20), ("a", " and more"), (1, 12), OPTIONS)
    )
]
BAD = [b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "n": 0}', b'{"prompt": "a", "max_tokens": 1000}', b"\xff"]


def resident_mb():
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * 4096 / 1e6


class Clients:
    """Threads that send requests, and what they found wrong."""

    def __init__(self, port, wanted):
        self.port = port
        self.wanted = wanted
        self.wrong = []
        self.kinds = dict.fromkeys(("answered", "streamed", "refused", "left", "late", "busy"), 0)
        self.numbers = itertools.count()
        self.lock = threading.Lock()

    def run(self, requests):
        def work(seed):
            dice = random.Random(seed)
            while next(self.numbers) < requests:
                try:
                    self.one(dice)
                except Exception as error:
                    self.wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def count(self, kind):
        with self.lock:
            self.kinds[kind] += 1

    def one(self, dice):
        number = dice.randrange(len(JOBS))
        body = {**JOBS[number], "priority": dice.randrange(3)}
        kind = dice.random()
        if kind < 0.1:
            status, _ = self.post(dice.choice(BAD))
            assert status == 400
            return self.count("refused")
        if kind < 0.25:
            return self.leave(json.dumps({**body, "max_tokens": 40, "stream": dice.random() < 0.5}).encode(), dice)
        if kind < 0.3:
            status, _ = self.post(json.dumps({**body, "deadline": 0.0005}).encode())
            assert status in (200, 429, 504), status
            return self.count("busy" if status == 429 else "late")
        body["stream"] = kind < 0.65
        status, text = self.post(json.dumps(body).encode())
        if status == 429:
            return self.count("busy")
        assert status == 200, (status, text)
        if body["stream"]:
            parts = [json.loads(line[6:]) for line in text.decode().split("\n\n") if line.startswith("data: {")]
            assert text.endswith(b"data: [DONE]\n\n")
            found = "".join(part["choices"][0]["text"] for part in parts)
        else:
            found = json.loads(text)["choices"][0]["text"]
        if found != self.wanted[number]:
            self.wrong.append((number, found, self.wanted[number]))
        return self.count("streamed" if body["stream"] else "answered")

    def post(self, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/v1/completions", body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def leave(self, body, dice):
        """Disconnects after a moment, or in the middle of the body."""
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sent = body if dice.random() < 0.8 else body[:10]
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head + sent)
            time.sleep(dice.random() * 0.03)
        self.count("left")


def test_random_requests_get_their_own_texts_and_leave_nothing_behind():
    """With few pages, so that requests are preempted, and a short queue, so that some are told to come again."""
    model = random_model()
    wanted = {}
    for options in OPTIONS:
        jobs = {number: job for number, job in enumerate(JOBS) if options.items() <= job.items()}
        prompts, news, seeds = zip(
            *((job["prompt"], job["max_tokens"], job["seed"]) for job in jobs.values()), strict=True
        )
        texts = lj.generate(model, [*prompts], max_new_tokens=[*news], seed=[*seeds], **options)
        wanted |= {number: out.text for number, out in zip(jobs, texts, strict=True)}
    assert len(wanted) == len(JOBS)
    with lj.Engine(model, slots=SLOTS, page_size=8, num_pages=PAGES, max_waiting=5) as engine:
        engine.warm_up()
        running = Running(engine, Settings("tiny"))
        try:
            clients = Clients(running.port, wanted)
            clients.run(REQUESTS // 3)
            gc.collect()
            arrays, memory = len(jax.live_arrays()), resident_mb()
            clients.numbers = itertools.count()
            clients.run(REQUESTS - REQUESTS // 3)
            deadline = time.monotonic() + 30
            while engine.stats().running or engine.stats().waiting:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            stats = engine.stats()
            engine.inspect(lambda core: core.pages.check([]))
            assert engine.inspect(lambda core: core.idle)
            gc.collect()
            assert len(jax.live_arrays()) <= arrays + 40
            assert resident_mb() < memory + 60
        finally:
            running.close()
    assert clients.wrong == []
    assert all(clients.kinds[kind] > 0 for kind in ("answered", "streamed", "refused", "left", "late"))
    assert stats.pages.held == 0
    assert stats.failures == 0
    assert stats.requests == stats.finished + stats.cancelled + stats.expired
