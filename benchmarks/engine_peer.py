"""Another implementation's server under the engine's trace: the same weights and prompts, tokens timed as they arrive.

The server streams over a Unix socket, where no packet waits for another one's acknowledgement. Tokens are greedy, an
end-of-text token does not end a text, and no part of a prompt comes from an earlier request.
"""

import http.client
import itertools
import json
import socket
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llorch_jax as lj
from benchmarks.agreement import judged, rounding
from benchmarks.arrivals import Arrival, Times
from benchmarks.compare import write_checkpoint
from benchmarks.measure import machine
from benchmarks.peer_process import FOLDER, Peer, PeerError
from benchmarks.reports import Report

Peers = dict[str, tuple[str, Path | None]]  # for each name its interpreter, and a script in place of the usual one

SERVERS = {"llama.cpp": "lcpp_server.py"}
CACHES = {"a cache per slot": False, "one cache": True}  # whether the slots share one buffer of keys and values
GREEDY = {"samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False, "stream": True}


class Server(Peer):
    """llama.cpp's server; use it in a `with` statement."""

    def __init__(self, name: str, python: str, script: Path | None = None) -> None:
        super().__init__(name, python, script or FOLDER / SERVERS[name])
        self._socket = ""

    def start(self, directory: Path, work: Path, slots: int, context: int, unified: bool) -> None:
        """Starts serving a model, with a number of slots that each have room for so many tokens."""
        places = {"directory": str(directory), "work": str(work)}
        sizes = {"threads": machine()["cores"], "slots": slots, "context": context, "unified": unified}
        answer = self.ask(op="start", **places, **sizes)
        self._socket = answer["socket"]
        self.versions = answer["versions"]
        self.build = answer["build"]

    def run(self, arrivals: Sequence[Arrival]) -> list[Times]:
        """Runs a trace in real time, with a connection for every request."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(arrivals)) as pool:
            found = []
            for arrival in arrivals:
                time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
                found.append(pool.submit(self._request, arrival, start))
            return [each.result() for each in found]

    def _request(self, arrival: Arrival, start: float) -> Times:
        times = Times(arrival)
        connection = _Connection(self._socket)
        try:
            body = json.dumps(GREEDY | {"prompt": arrival.prompt, "n_predict": arrival.new})
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise PeerError(f"{self.name}: {response.read().decode()}")
            for line in response:
                now = time.perf_counter() - start
                if line.startswith(b"data: {"):
                    ids = json.loads(line[6:]).get("tokens", [])
                    times.tokens += [now] * len(ids)
                    times.ids += ids
        finally:
            connection.close()
        if len(times.ids) != arrival.new:
            raise PeerError(f"{self.name}: expected {arrival.new} tokens, got {len(times.ids)}")
        return times


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def run_servers(
    peers: Peers,
    config: lj.GPT2Config,
    params: lj.Params,
    slots: int,
    arrivals: Sequence[Arrival],
    rounds: int,
    expected: Sequence[Times],
) -> tuple[dict[str, list[list[Times]]], Report]:
    """Runs a trace on each peer's servers, one server after the other.

    Args:
        peers: the peers.
        config: the model's hyperparameters.
        params: its weights, in float32.
        slots: number of requests that a server runs at the same time.
        arrivals: the trace.
        rounds: number of runs.
        expected: a run of the trace, with whose tokens those of the peers are compared.

    Returns:
        Each server's runs, and what a report has to say about them besides.
    """
    runs: dict[str, list[list[Times]]] = {}
    about: Report = {"agreement": [], "versions": {}, "builds": {}}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        if peers:
            write_checkpoint(directory, config, params)
        for peer, (cache, unified) in itertools.product(peers, CACHES.items()):
            name = f"{peer}, {cache}"
            with Server(peer, *peers[peer]) as server:
                server.start(directory, Path(folder), slots, config.n_positions, unified)
                server.run(arrivals[:1])  # reads the weights
                runs[name] = [server.run(arrivals) for _ in range(rounds)]
            prompts = [each.prompt for each in arrivals]
            ours, theirs = ([each.ids for each in run] for run in (expected, runs[name][0]))
            found = judged(params, config, prompts, ours, theirs, rounding(peer), banned=config.vocab_size - 1)
            about["agreement"].append({"case": "trace", "contender": name, "exact": True} | found)
            about["versions"] |= server.versions
            about["builds"][name] = server.build
    return runs, about
