"""The engine under load: throughput and latencies, compared with one request at a time and with static batches.

    python -m benchmarks.engine [--preset gpt2] [--requests 40] [--rate 4] [--slots 8] [--rounds 1] [--plot FILE]
                                [--peer llama.cpp=PYTHON]

Requests arrive at random (Poisson) with prompts and answers of random (log-normal) lengths, all from one seed. The same
trace is run by the engine, by an engine with one slot, and in static batches with as many rows as the engine has slots,
each of which runs until its last row has ended; with --peer also by llama.cpp's server with as many slots, whose tokens
must be the engine's but for near ties, or the exit code is 1 (docs/benchmarks.md describes PYTHON). There are three
more figures: the time to the first token of a prompt whose first 512 tokens are computed, cached on the device, or
cached in the second pool; the time between tokens of running streams while a prompt of 900 tokens is processed; and the
ratio of an engine step with all slots in use to a step of `generate_tokens` at the same lengths.
"""

import dataclasses
import functools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

import llorch_jax as lj
from benchmarks.agreement import tell_agreement
from benchmarks.arrivals import Arrival, Times, summary, trace
from benchmarks.compare import peer_option
from benchmarks.engine_peer import SERVERS, Peers, run_servers
from benchmarks.measure import Sample, random_model
from benchmarks.reports import Report, keep, parser, plain, report
from llorch_jax.decoding.overflow import padded
from llorch_jax.decoding.request import prepare
from llorch_jax.decoding.streaming import stream_steps
from llorch_jax.engine.core import Core
from llorch_jax.engine.device import Plot
from llorch_jax.engine.scheduler import Limits
from llorch_jax.engine.sequences import Request, Token
from llorch_jax.engine.worker import Worker
from llorch_jax.text.engine import CHUNK, IDLE_CHUNK

PAGE = 32


class Engine:
    """An engine that takes and returns tokens."""

    def __init__(self, params: lj.Params, config: lj.GPT2Config, slots: int, offload_bytes: int = 0) -> None:
        limits = Limits(slots, PAGE, CHUNK, IDLE_CHUNK)
        pages = slots * -(-config.n_positions // PAGE)
        plot = Plot(limits, pages, offload_bytes=offload_bytes)
        self._worker = Worker(lambda: Core(params, config, plot), max_waiting=10_000)
        self._worker.call(Core.warm_up)
        self._asked: list[threading.Event] = []

    def run(self, arrivals: Sequence[Arrival]) -> list[Times]:
        """Runs a trace in real time, starting with an empty prefix cache."""
        self._worker.call(lambda core: core.pages.forget())
        start = time.perf_counter()
        found = []
        for arrival in arrivals:
            time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            times, _ = self.submit(arrival, start)
            found.append(times)
        self.wait()
        return found

    def submit(self, arrival: Arrival, start: float) -> tuple[Times, threading.Event]:
        """Queues a request; the event is set once it has ended."""
        times, done = Times(arrival), threading.Event()
        self._asked.append(done)

        def take(token: Token) -> bool:
            times.tokens.append(time.perf_counter() - start)
            times.ids.append(token.id)
            if token.last:
                done.set()
            return True

        def fail(error: BaseException) -> None:
            done.set()
            raise error

        key = np.zeros(2, np.uint32)
        tokens = np.asarray(arrival.prompt, np.int32)
        request = Request(tokens=tokens, max_new_tokens=arrival.new, settings={}, key=key, on_token=take, on_error=fail)
        self._worker.submit(dataclasses.replace(request, settings={"temperature": 0.0}))
        return times, done

    def wait(self) -> None:
        """Waits until there is nothing left to do, without disturbing the engine before that."""
        for done in self._asked:
            done.wait()
        self._asked.clear()
        while not self._worker.call(lambda core: core.idle):
            time.sleep(0.01)

    def forget(self) -> None:
        """Empties the prefix cache."""
        self._worker.call(lambda core: core.pages.forget())

    def restored(self) -> int:
        """How many pages the second pool has given back so far."""
        return self._worker.call(lambda core: core.offload.store.counts().restored)

    def close(self) -> None:
        """Ends the thread."""
        self._worker.close(drain=True, timeout=None)


def static_batches(params: lj.Params, config: lj.GPT2Config, rows: int, arrivals: Sequence[Arrival]) -> list[Times]:
    """Runs a trace in real time, in batches of up to `rows` requests that have arrived, one batch after the other."""
    start = time.perf_counter()
    left, found = list(arrivals), []
    while left:
        time.sleep(max(0.0, start + left[0].at - time.perf_counter()))
        now = time.perf_counter() - start
        batch = [each for each in left[:rows] if each.at <= now]
        left = left[len(batch) :]
        times = [Times(each) for each in batch]
        filled = batch + [batch[-1]] * (rows - len(batch))  # a fixed number of rows: no recompilation
        tokens, lengths = padded([each.prompt for each in filled])
        cache = lj.make_cache(config, "static", batch_size=rows)
        request = prepare(config, tokens, [each.new for each in filled], cache, lengths, eos_id=None)
        for number, _ in enumerate(stream_steps(params, config, request)):
            now = time.perf_counter() - start
            for each in times:
                if number < each.arrival.new:
                    each.tokens.append(now)
        found += times
    return found


def prefix_hit(engine: Engine, config: lj.GPT2Config, tokens: int, seed: int) -> dict[str, float]:
    """Milliseconds to the first token of a prompt of slightly more than `tokens` tokens, by where these come from.

    Args:
        engine: one with a second pool, and pages for no more than one whole context.
        config: the model's hyperparameters.
        tokens: length of the common beginning.
        seed: another one for every call, as the second pool remembers the text.
    """
    dice = np.random.default_rng(seed)
    beginning = dice.integers(0, config.vocab_size, tokens).tolist()

    def first(prompt: list[int]) -> float:
        times, done = engine.submit(Arrival(0.0, prompt, 1), time.perf_counter())
        done.wait()
        engine.wait()
        return 1000 * times.first

    before = engine.restored()
    found = {"computed": first([*beginning, 0, 1, 2]), "cached": first([*beginning, 1, 1, 2])}
    first(dice.integers(0, config.vocab_size, config.n_positions).tolist())  # takes all pages
    found["restored"] = first([*beginning, 2, 1, 2])
    assert engine.restored() - before == tokens // PAGE, "the second pool has everything, and the device nothing"
    return found


def stall(engine: Engine, config: lj.GPT2Config, slots: int, tokens: int) -> tuple[list[float], float]:
    """Milliseconds between tokens of streams while a prompt of `tokens` tokens is processed, and to its first token."""
    dice = np.random.default_rng(2)
    engine.forget()
    start = time.perf_counter()
    prompts = dice.integers(0, config.vocab_size, (slots - 1, 16)).tolist()
    new = min(400, config.n_positions - 20)
    streams = [engine.submit(Arrival(0.0, prompt, new), start)[0] for prompt in prompts]
    while any(len(each.tokens) < 4 for each in streams):
        time.sleep(0.01)
    long = Arrival(time.perf_counter() - start, dice.integers(0, config.vocab_size, tokens).tolist(), 1)
    times, done = engine.submit(long, start)
    done.wait()
    since, until = long.at, times.tokens[0]
    engine.wait()
    gaps = [
        1000 * (after - before)
        for each in streams
        for before, after in zip(each.tokens, each.tokens[1:], strict=False)
        if before >= since and after <= until
    ]
    return gaps, 1000 * times.first


def step_ms(engine: Engine, params: lj.Params, config: lj.GPT2Config, slots: int, new: int) -> tuple[float, float]:
    """Milliseconds of a step with all slots in use, and of a step of `generate_tokens` with as many rows.

    Both are means of the steps from token `slots`, by which every prompt is in the cache, to token `new` of each row.
    """
    prompts = np.random.default_rng(3).integers(0, config.vocab_size, (slots, 16)).astype(np.int32)
    engine.forget()
    start = time.perf_counter()
    times = [engine.submit(Arrival(0.0, row.tolist(), new + slots), start)[0] for row in prompts]  # none ends before
    engine.wait()
    spans = [each.tokens[new - 1] - each.tokens[slots - 1] for each in times]

    def generate(count: int) -> float:
        cache = lj.make_cache(config, "paged", batch_size=slots)
        begin = time.perf_counter()
        jax.block_until_ready(lj.generate_tokens(params, config, prompts, count, cache=cache, eos_id=None)[0])
        return time.perf_counter() - begin

    for count in (new, slots):  # compiles its programs
        generate(count)
    own, theirs = statistics.median(spans), generate(new) - generate(slots)
    return 1000 * own / (new - slots), 1000 * theirs / (new - slots)


def measure(preset: str, requests: int, rate: float, slots: int, rounds: int, peers: Peers) -> Report:
    """All figures."""
    config, params = random_model(preset)
    arrivals = trace(config, requests, rate)
    many, one = Engine(params, config, slots), Engine(params, config, 1)
    offloading = Engine(params, config, 1, offload_bytes=2**31)
    contenders: dict[str, Callable[[], list[Times]]] = {
        "engine": lambda: many.run(arrivals),
        "one at a time": lambda: one.run(arrivals),
        "static batches": lambda: static_batches(params, config, slots, arrivals),
    }
    static_batches(params, config, slots, arrivals)  # compiles its programs
    runs = {name: [run() for _ in range(rounds)] for name, run in contenders.items()}
    theirs, about = run_servers(peers, config, params, slots, arrivals, rounds, runs["engine"][0])
    runs |= theirs
    found = {name: [summary(each) for each in values] for name, values in runs.items()}
    long = min(900, config.n_positions - 32)
    cached = min(512, config.n_positions // 2)
    firsts = [prefix_hit(offloading, config, cached, seed) for seed in range(rounds + 2)]
    gaps, first = stall(many, config, slots, long)
    steps = [step_ms(many, params, config, slots, min(100, config.n_positions // 4)) for _ in range(rounds + 2)]
    many.close()
    one.close()
    offloading.close()
    rows = [
        {
            "name": name,
            "unit": "tokens/s",
            "value": Sample.of([each["tokens_per_second"] for each in values]),
            **values[0],
        }
        for name, values in found.items()
    ]
    extra = {
        "prefix_hit_ms": {"tokens": cached}
        | {name: statistics.median(each[name] for each in firsts) for name in firsts[0]},
        "stall_ms": {
            "tokens": long,
            "p50": float(np.percentile(gaps, 50)),
            "p99": float(np.percentile(gaps, 99)),
            "first": first,
        },
        "step_ms": {
            "engine": statistics.median(a for a, _ in steps),
            "generate_tokens": statistics.median(b for _, b in steps),
            "ratio": Sample.of([a / b for a, b in steps]),
        },
    }
    setting = {"preset": preset, "requests": requests, "rate": rate, "slots": slots}
    return report("engine", setting, plain(rows), {}, "static batches", **extra, **about)


def show(figures: Report) -> None:
    """Prints the figures."""
    print(f"== engine: {', '.join(f'{key} {value}' for key, value in figures['setting'].items())}")
    width = max(16, *(len(row["name"]) + 1 for row in figures["rows"]))
    print(f"{'':<{width}}{'tokens/s':>9}   {'first token, ms: p50 / p95 / p99':<34}between tokens, ms: p50 / p95 / p99")
    for row in figures["rows"]:
        first, between = (
            " / ".join(f"{value:,.0f}" for value in row[key].values())
            for key in ("first_token_ms", "between_tokens_ms")
        )
        print(f"{row['name']:<{width}}{row['value']['median']:>9.1f}   {first:<34}{between}")
    hit, wait, step = figures["prefix_hit_ms"], figures["stall_ms"], figures["step_ms"]
    print(f"first token after a prefix of {hit['tokens']} tokens: {hit['computed']:.1f} ms if it is computed")
    for name, place in {"cached": "cached", "restored": "in the second pool"}.items():
        print(f"  {hit[name]:.1f} ms if it is {place}, {hit['computed'] / hit[name]:.1f} x faster")
    print(
        f"while a prompt of {wait['tokens']} tokens is processed: {wait['p50']:.1f} ms between tokens, "
        f"p99 {wait['p99']:.1f} ({wait['p99'] / wait['p50']:.2f} x); its first token after {wait['first']:,.0f} ms"
    )
    ratio = step["ratio"]
    print(
        f"a step with all slots in use: {step['engine']:.1f} ms, {ratio['median']:.3f} x generate_tokens "
        f"({ratio['low']:.3f} .. {ratio['high']:.3f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__, rounds=1)
    options.add_argument("--requests", type=int, default=40)
    options.add_argument("--rate", type=float, default=4.0, help="mean number of arrivals per second")
    options.add_argument("--slots", type=int, default=8)
    peer = functools.partial(peer_option, names=SERVERS)
    options.add_argument("--peer", type=peer, action="append", default=[], metavar="NAME=PYTHON")
    options.add_argument("--plot", type=Path, help="file for a plot of the latencies; needs matplotlib")
    chosen = options.parse_args(argv)
    figures = measure(chosen.preset, chosen.requests, chosen.rate, chosen.slots, chosen.rounds, dict(chosen.peer))
    show(figures)
    keep(figures, chosen.json)
    if chosen.plot:
        from benchmarks.engine_plot import plot

        plot(figures, chosen.plot)
    return tell_agreement(figures)


if __name__ == "__main__":
    sys.exit(main())
