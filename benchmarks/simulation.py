"""Replicas of a model behind a router, simulated with the engine's own loop: hit rates and times to the first token.

    python -m benchmarks.simulation [--replicas 1000] [--requests 16000] [--rate 0.6] [--prompts 500] [--seed 0]
                                    [--routers "random;prefix-aware"]

Each replica is an `engine.core.Core` with its scheduler, its pages and its prefix cache. Only the device is replaced,
by one that computes nothing and takes the time that the cost model gives each call. Requests arrive at random
(Poisson). Each prompt begins with one of the system prompts, whose popularity falls as 1 / rank, and goes on with
tokens of its own; lengths of both and of answers are log-normal. Everything follows from the seed.
"""

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks import routers
from benchmarks.reports import Report, keep, parser, report
from benchmarks.scaling_model import Host, device_seconds, fit, prefill_seconds
from llorch_jax.buckets import SMALLEST, power_of_two
from llorch_jax.config import GPT2Config
from llorch_jax.engine import core
from llorch_jax.engine.device import Plot
from llorch_jax.engine.pages import PagePool
from llorch_jax.engine.scheduler import Limits
from llorch_jax.engine.sequences import Request, Token
from llorch_jax.engine.sequences import Sequence as Running
from llorch_jax.text.engine import CHUNK, IDLE_CHUNK

CONFIG = GPT2Config()
PAGE = 32
LIMITS = Limits(8, PAGE, CHUNK, IDLE_CHUNK)
PAGES = LIMITS.slots * CONFIG.n_positions // PAGE  # as `lj.Engine` has by default
HOST_WORK = 1.7e-3  # seconds of the host's work per step: benchmarks/RESULTS.md, "The engine under load"
WARM_UP = 0.25  # the first part of the requests finds empty caches, and is not counted


class Arrival(NamedTuple):
    """A request: when it arrives, in seconds, its prompt int32 [T], and how many tokens it asks for."""

    at: float
    prompt: np.ndarray
    new: int


class Served(NamedTuple):
    """What became of a request.

    Attributes:
        at: when it arrived, in seconds.
        first: seconds from then to its first token.
        total: seconds from its arrival to its last token.
        prompt: number of its prompt's tokens.
        cached: how many of them the prefix cache had.
    """

    at: float
    first: float
    total: float
    prompt: int
    cached: int


def workload(requests: int, rate: float, prompts: int, seed: int) -> list[Arrival]:
    """Requests at `rate` per second that share `prompts` system prompts."""
    dice = np.random.default_rng(seed)
    lengths = np.clip(dice.lognormal(np.log(300), 0.4, prompts), 64, 640).astype(int)
    systems = [dice.integers(0, CONFIG.vocab_size, length, np.int32) for length in lengths]
    popularity = 1 / np.arange(1, prompts + 1)
    chosen = dice.choice(prompts, requests, p=popularity / popularity.sum())
    at = np.cumsum(dice.exponential(1 / rate, requests))
    own = np.clip(dice.lognormal(np.log(40), 0.6, requests), 4, 200).astype(int)
    new = np.clip(dice.lognormal(np.log(32), 0.6, requests), 4, 128).astype(int)
    return [
        Arrival(
            float(when), np.concatenate([systems[n], dice.integers(0, CONFIG.vocab_size, own_, np.int32)]), int(new_)
        )
        for when, n, own_, new_ in zip(at, chosen, own, new, strict=True)
    ]


class StepTimes:
    """Seconds of a replica's calls, by the cost model."""

    def __init__(self, host: Host, config: GPT2Config) -> None:
        # As in `engine.device`, rows and chunks are padded to powers of two, chunks to no fewer than 16 tokens.
        rows = [min(power_of_two(count), LIMITS.slots) for count in range(1, LIMITS.slots + 1)]
        chunks = [max(power_of_two(count), SMALLEST) for count in range(1, LIMITS.idle_chunk + 1)]
        self._decode = [0.0, *(device_seconds(host, config, count, config.n_positions / 4) for count in rows)]
        self._prefill = [0.0, *(prefill_seconds(host, config, count, 0) for count in chunks)]

    def decode(self, rows: int) -> float:
        """One token for each of some rows."""
        return self._decode[rows]

    def prefill(self, count: int) -> float:
        """Some tokens of a prompt."""
        return self._prefill[count]


class _Clockwork:
    """The device of a replica: nothing but the time when what it was given last will be ready."""

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.ready = 0.0
        self.now = 0.0

    def prefill(self, sequence: Running, count: int) -> None:
        self._take(self.times.prefill(count))

    def enter(self, sequence: Running, logits: None) -> Any:
        return self._tokens(1)

    def decode(self, sequences: Sequence[Running]) -> Any:
        self._take(self.times.decode(len(sequences)))
        return self._tokens(len(sequences))

    def _take(self, duration: float) -> None:
        self.ready = max(self.ready, self.now) + duration

    def _tokens(self, rows: int) -> Any:
        return np.zeros(rows, np.int32), np.zeros(rows), np.full(0, self.ready)


class Replica(core.Core):
    """An engine whose device only takes time. Results carry the time when they are ready."""

    def __init__(self, times: StepTimes) -> None:
        self._clockwork = _Clockwork(times)
        self._ready: deque[float] = deque()
        self.clock = 0.0
        super().__init__(None, CONFIG, Plot(LIMITS, PAGES))  # type: ignore[arg-type]

    def _set_up(self) -> None:
        self._device: Any = self._clockwork
        self.pages = PagePool(self._plot.num_pages, self._limits.page_size)
        self._free_slots = list(range(self._limits.slots - 1, -1, -1))

    def run_step(self, now: float) -> float:
        """One iteration at `now`; returns when the next one begins.

        The host is at most one iteration ahead of the device.
        """
        before = self._clockwork.ready
        self.clock = now + HOST_WORK
        self._clockwork.now = self.clock
        self.step()
        return max(self.clock, before)

    def _decode(self, sequences: list[Running], involved: list[Running]) -> None:
        super()._decode(sequences, involved)
        self._ready.append(self._clockwork.ready)

    def _prefill(self, sequence: Running, count: int) -> None:
        waiting = len(self._in_flight)
        super()._prefill(sequence, count)
        if len(self._in_flight) > waiting:
            self._ready.append(self._clockwork.ready)

    def _read(self) -> None:
        self.clock = max(self.clock, self._ready.popleft())
        super()._read()


def simulate(arrivals: Sequence[Arrival], replicas: int, route: routers.Router, times: StepTimes) -> list[Served]:
    """What became of each request, in the order in which they ended."""
    engines = [Replica(times) for _ in range(replicas)]
    load = np.zeros(replicas, np.int64)
    served: list[Served] = []
    busy = [False] * replicas
    events: list[tuple[float, int]] = []  # when a replica's next iteration begins

    def submit(place: int, arrival: Arrival) -> None:
        engine, first = engines[place], []

        def take(token: Token) -> bool:
            if not first:
                first.append(engine.clock - arrival.at)
            if token.last:
                load[place] -= 1
                total = engine.clock - arrival.at
                served.append(Served(arrival.at, first[0], total, len(arrival.prompt), sequence.cached))
            return True

        sequence = engine.add(
            Request(
                tokens=arrival.prompt, max_new_tokens=arrival.new, settings={}, key=_KEY, on_token=take, on_error=_fail
            )
        )
        load[place] += 1
        if not busy[place]:
            busy[place] = True
            heapq.heappush(events, (arrival.at, place))

    def step_until(moment: float) -> None:
        while events and events[0][0] <= moment:
            now, place = heapq.heappop(events)
            then = engines[place].run_step(now)
            busy[place] = not engines[place].idle
            if busy[place]:
                heapq.heappush(events, (then, place))

    for arrival in arrivals:
        step_until(arrival.at)
        submit(route(arrival.prompt, load), arrival)
    step_until(float("inf"))
    return served


_KEY = np.zeros(2, np.uint32)


def _fail(error: BaseException) -> None:
    raise error


ROUTERS: dict[str, Callable[[int, int], routers.Router]] = {
    "random": routers.at_random,
    "round robin": routers.round_robin,
    "least loaded": routers.least_loaded,
    "prefix-aware": partial(routers.prefix_aware, page_size=PAGE),
}


def percentile_ms(values: Sequence[float], share: float) -> float:
    """Milliseconds below which this share of some seconds lies, in percent."""
    return 1000 * float(np.percentile(values, share))


def measure(replicas: int, requests: int, rate: float, prompts: int, names: Sequence[str], seed: int) -> Report:
    """One row per router, for `rate` requests per second and replica."""
    arrivals = workload(requests, rate * replicas, prompts, seed)
    times = StepTimes(fit(), CONFIG)
    counted = arrivals[int(WARM_UP * requests)].at
    rows = []
    for name in names:
        began = time.perf_counter()
        served = [
            each for each in simulate(arrivals, replicas, ROUTERS[name](replicas, seed), times) if each.at >= counted
        ]
        first = [each.first for each in served]
        line = {
            "name": name,
            "hit_rate": sum(each.cached for each in served) / sum(each.prompt for each in served),
            "first_token_ms": {f"p{share}": percentile_ms(first, share) for share in (50, 95, 99)},
            "total_ms": {f"p{share}": percentile_ms([each.total for each in served], share) for share in (50, 99)},
            "run_s": time.perf_counter() - began,
        }
        rows.append(line)
    setting = {"replicas": replicas, "requests": requests, "rate": rate, "prompts": prompts, "seed": seed}
    return report("simulation", setting, rows, {})


def show(figures: Report) -> None:
    """Prints a line per router."""
    print(f"== simulation: {', '.join(f'{key} {value}' for key, value in figures['setting'].items())}")
    print(f"{'':<24}{'hit rate':>8}   {'first token, ms: p50 / p95 / p99':<34}whole answer, ms: p50 / p99")
    for line in figures["rows"]:
        first, total = (
            " / ".join(f"{value:,.0f}" for value in line[key].values()) for key in ("first_token_ms", "total_ms")
        )
        print(f"{line['name']:<24}{line['hit_rate']:>8.2f}   {first:<34}{total}")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--replicas", type=int, default=1000)
    options.add_argument("--requests", type=int, default=16_000)
    options.add_argument("--rate", type=float, default=0.6, help="requests per second and replica")
    options.add_argument("--prompts", type=int, default=500, help="number of system prompts")
    options.add_argument("--routers", type=lambda text: text.split(";"), default=list(ROUTERS))
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args(argv)
    figures = measure(chosen.replicas, chosen.requests, chosen.rate, chosen.prompts, chosen.routers, chosen.seed)
    show(figures)
    keep(figures, chosen.json)


if __name__ == "__main__":
    main()
