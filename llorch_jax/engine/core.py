"""The engine's loop, one iteration at a time: plan, dispatch, and read the results of the previous iteration.

Results are read one iteration late, so that the device has the next step in its queue while the host looks at the last.
A slot whose text has ended in the meantime computes nothing: the device knows which ids end it and how many tokens are
left. All of this runs in one thread.
"""

import math
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llorch_jax.cache.files import fingerprint
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.steps import check_chosen
from llorch_jax.engine.copies import pools_of
from llorch_jax.engine.device import Device, Plot
from llorch_jax.engine.host_pages import HostPages
from llorch_jax.engine.offload import Offload
from llorch_jax.engine.pages import PagePool
from llorch_jax.engine.prefix_files import load_prefixes, save_prefixes
from llorch_jax.engine.scheduler import Plan, Rank, schedule
from llorch_jax.engine.sequences import Ranks, Request, Sequence
from llorch_jax.engine.statistics import Statistics
from llorch_jax.errors import CapacityError, EngineError
from llorch_jax.params import Params

_LATE = 1  # number of iterations by which reading lags behind dispatching


class Core:
    """Requests, pages and slots of one model."""

    def __init__(self, params: Params, config: GPT2Config, plot: Plot, known: np.ndarray | None = None) -> None:
        """Allocates the pool.

        Args:
            params: the model's parameters.
            config: the model's hyperparameters.
            plot: the engine's fixed sizes.
            known: bits of the ids that may be drawn, see `Settings`; None for all.
        """
        self._params = params
        self._config = config
        self._plot = plot
        self._limits = plot.limits
        self._known = known
        self._ranks = Ranks()
        self._waiting: dict[Rank, Sequence] = {}
        self._running: dict[Rank, Sequence] = {}
        self._in_flight: deque[tuple[list[Sequence], Any]] = deque()
        self.statistics = Statistics()
        self._set_up()
        size = plot.offload_bytes
        self.offload = Offload(HostPages.of(pools_of(self._device.cache), size) if size else HostPages())

    def _set_up(self) -> None:
        """Makes an empty pool, and slots without requests."""
        self._device = Device(self._params, self._config, self._plot, self._known)
        self.pages = PagePool(self._plot.num_pages, self._limits.page_size)
        self._free_slots = list(range(self._limits.slots - 1, -1, -1))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running or self._in_flight)

    @property
    def slots(self) -> int:
        """Number of requests that can run at once."""
        return self._limits.slots

    @property
    def waiting(self) -> int:
        """Number of waiting requests; can be read from any thread."""
        return len(self._waiting)

    @property
    def queue(self) -> list[Sequence]:
        """The waiting requests by rank."""
        return [self._waiting[rank] for rank in sorted(self._waiting)]

    @property
    def active(self) -> list[Sequence]:
        """The running requests by rank."""
        return [self._running[rank] for rank in sorted(self._running)]

    def check(self, request: Request) -> None:
        """Raises CapacityError for a request that could never be answered."""
        most = self._config.n_positions
        total = len(request.tokens) + request.max_new_tokens - 1
        if total > most:
            raise CapacityError(
                f"prompt and max_new_tokens: expected both within the context of {most}, got {len(request.tokens)} and "
                f"{request.max_new_tokens} tokens"
            )
        needed = -(-total // self._limits.page_size)
        if needed > self._plot.num_pages:
            raise CapacityError(
                f"num_pages: expected an engine with {needed} pages for {len(request.tokens)} and "
                f"{request.max_new_tokens} tokens, got {self._plot.num_pages} pages of {self._limits.page_size}"
            )

    def add(self, request: Request) -> Sequence:
        """Queues a checked request."""
        sequence = Sequence(request, self._ranks.next(request.priority), self._limits.page_size)
        self._waiting[sequence.rank] = sequence
        self.statistics.requests += 1
        return sequence

    def cancel(self, sequence: Sequence, error: BaseException | None = None) -> None:
        """Ends a request early and frees what it holds; `error` is reported to it."""
        if sequence.over:
            return
        sequence.over = True
        self._drop(sequence)
        if error is not None:
            sequence.request.on_error(error)

    def withdraw(self, sequence: Sequence) -> None:
        """Cancels a request for its caller."""
        if not sequence.over:
            self.statistics.cancelled += 1
            self.cancel(sequence, EngineError("request: it was cancelled"))

    def step(self) -> None:
        """Runs one iteration."""
        self._expire()
        plan = self._plan()
        if plan.preempt and self._in_flight:  # requests that have ended since then may free enough pages
            self._read_all()
            plan = self._plan()
        involved: list[Sequence] = []
        try:
            self._carry_out(plan, involved)
        except Exception as error:
            self._recover(involved, error)
            return
        nothing = not (plan.prefill or plan.decode)
        while len(self._in_flight) > (0 if nothing else _LATE):
            self._read()
        self._store_evicted()

    def save_prefixes(self, path: Path) -> int:
        """Writes the prefix cache to a file, and returns the number of its pages."""
        self._read_all()
        print_of = fingerprint(self._params, self._config)
        return save_prefixes(path, self._device.cache, self.pages, self.offload.store, print_of)

    def load_prefixes(self, path: Path) -> int:
        """Adds the pages of a file to the prefix cache, as many as are free in both pools, and returns their number."""
        print_of = fingerprint(self._params, self._config)
        vocab_size = self._config.vocab_size
        return load_prefixes(path, self._device, self.pages, self.offload.store, print_of, vocab_size)

    def fail_all(self, error: BaseException) -> None:
        """Ends all requests early, with an error."""
        self._in_flight.clear()
        for sequence in [*self._running.values(), *self._waiting.values()]:
            self.cancel(sequence, error)

    def held(self) -> list[list[int]]:
        """The pages of each running request."""
        return [sequence.held for sequence in self._running.values()]

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in [*self._waiting.values(), *self._running.values()]:
            deadline = sequence.request.deadline
            if deadline is not None and now >= deadline:
                self.statistics.expired += 1
                self.cancel(sequence, EngineError("deadline: expected an answer before the deadline, got none"))

    def _plan(self) -> Plan:
        waiting = []
        for sequence in self.queue[: self._limits.slots]:
            pages = self._match(sequence)
            cached = len(pages) * self._limits.page_size
            waiting.append(sequence.waiting(cached, self.pages.idle_among(pages), pages.count(-1)))
        running = [each.running(self.pages.owned(each.held)) for each in self._running.values()]
        return schedule(waiting, running, self.pages.available, self._limits)

    def _carry_out(self, plan: Plan, involved: list[Sequence]) -> None:
        for rank in plan.preempt:
            self._preempt(self._running[rank])
        absent = {rank: self._admit(self._waiting[rank]) for rank in plan.admit}
        decoding = [self._running[rank] for rank in plan.decode]
        chunks = [(self._running[rank], count) for rank, count in plan.prefill]
        involved += [*decoding, *(sequence for sequence, _ in chunks)]
        for rank, entries in absent.items():
            for number, page in self.offload.allocate(self.pages, entries).items():
                self._running[rank].pages[number] = page
        for sequence in decoding:
            self._grow(sequence, 1)
        for sequence, count in chunks:
            self._grow(sequence, count)
        self.offload.dispatch(self.pages, self._device)
        involved[:] = decoding
        if decoding:
            self._decode(decoding, involved)
        for sequence, count in chunks:
            involved[:] = [sequence]
            self._prefill(sequence, count)

    def _match(self, sequence: Sequence) -> list[int]:
        """The pages that contain the beginning of a request; -1 for those that are in the second pool only."""
        return self.pages.match(sequence.tokens[: sequence.length], sequence.request.salt, self.offload.store.has)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.restart()
        sequence.preemptions += 1
        self.statistics.preemptions += 1
        self._waiting[sequence.rank] = sequence

    def _admit(self, sequence: Sequence) -> list[tuple[int, bytes, bytes]]:
        """Gives a request a slot and the pages that are on the device; returns those that are in the second pool."""
        del self._waiting[sequence.rank]
        pages = self._match(sequence)
        self.pages.hold(page for page in pages if page >= 0)
        if sequence.cached is None:
            self.statistics.prompt_tokens += sequence.target
            self.statistics.cached_tokens += len(pages) * self._limits.page_size
        absent = sequence.begin(pages, self._limits.page_size)
        sequence.slot = self._free_slots.pop()
        self._running[sequence.rank] = sequence
        return absent

    def _store_evicted(self) -> None:
        try:
            self.offload.finish()
        except Exception:  # they are lost, and nothing else: if a step has failed, its results will tell
            self.statistics.failures += 1

    def _drop(self, sequence: Sequence) -> None:
        """Frees what a finished request holds."""
        if self._waiting.pop(sequence.rank, None) is None and sequence.rank in self._running:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.rank]
        self.pages.release(sequence.held)
        self._free_slots.append(sequence.place)

    def _grow(self, sequence: Sequence, count: int) -> None:
        """Allocates pages for `count` more tokens, and frees those that have left the window."""
        window = self._config.sliding_window
        if window is not None:
            passed = max(sequence.computed - window + 1, 0) // self._limits.page_size
            left = [page for page in sequence.pages[:passed] if page >= 0]
            sequence.pages[:passed] = [-1] * passed
            self.pages.release(left)
        needed = -(-(sequence.computed + count) // self._limits.page_size) - len(sequence.pages)
        sequence.pages += self.pages.allocate(max(needed, 0))

    def _prefill(self, sequence: Sequence, count: int) -> None:
        """Dispatches a chunk and, after the last chunk, the first token."""
        logits = self._device.prefill(sequence, count)
        sequence.computed += count
        self._index(sequence)
        if sequence.decoding:
            self._in_flight.append(([sequence], self._device.enter(sequence, logits)))
            sequence.dispatched += 1

    def warm_up(self, *, guided: bool = False) -> None:
        """Compiles every program, those for guides too if asked to; does nothing while requests run."""
        if self.idle:
            self._device.warm_up(guided=guided)

    def _decode(self, sequences: list[Sequence], involved: list[Sequence]) -> None:
        """Dispatches the next token of some requests."""
        guided = any(sequence.request.guide is not None for sequence in sequences)
        results = self._device.feed(sequences) if guided else self._device.decode(sequences)
        for sequence in sequences:
            sequence.computed += 1
            sequence.dispatched += 1
        if guided:  # what may come next depends on the newest tokens, which are read while the logits are computed
            while self._in_flight:
                involved[:] = self._in_flight[0][0]
                self._receive()
            involved[:] = sequences
            results = self._device.draw(sequences, results)
        self._in_flight.append((sequences, results))
        self.statistics.steps += 1

    def _index(self, sequence: Sequence) -> None:
        for page, digest, content in sequence.filled(self._limits.page_size):
            self.pages.index(page, digest, content)

    def _read_all(self) -> None:
        while self._in_flight:
            self._read()

    def _read(self) -> None:
        """`_receive`, with the requests failed whose results cannot be had."""
        sequences, _ = self._in_flight[0]
        try:
            self._receive()
        except Exception as error:
            self._recover(sequences, error)

    def _receive(self) -> None:
        """Waits for the oldest results and passes them on to their requests.

        Raises:
            Exception: a program failed after it had been dispatched.
        """
        sequences, chosen = self._in_flight.popleft()
        token, logprob, top = jax.tree.map(np.asarray, chosen)
        now = time.perf_counter()
        tokens, logprobs = token.tolist(), logprob.tolist()
        for row, sequence in enumerate(sequences):
            if sequence.over:
                continue
            try:
                if math.isnan(logprobs[row]):
                    check_chosen(token[row : row + 1, None], logprob[row : row + 1, None])
                goes_on = sequence.take(tokens[row], logprobs[row], top, row)
            except Exception as error:  # of this request alone: its settings, its guide, or the caller's own code
                self.cancel(sequence, error)
                continue
            self._index(sequence)
            self.statistics.token(sequence, now)
            if not goes_on:
                sequence.over = True
                self.statistics.finished += 1
                self._drop(sequence)

    def _recover(self, involved: Iterable[Sequence], error: Exception) -> None:
        """Fails the requests of a step that raised an exception; the others are computed again in a new pool.

        The old pool may have been donated to the program that failed.
        """
        self.statistics.failures += 1
        self._in_flight.clear()
        self.offload.forget()
        involved = list(involved) or [*self._running.values()]  # some requests must fail, or it would happen again
        failed = EngineError(f"a step of the engine failed: {type(error).__name__}: {error}"[:300])
        for sequence in involved:
            if not sequence.over:
                sequence.over = True
                sequence.request.on_error(failed)
        for sequence in list(self._running.values()):
            sequence.restart()
            if not sequence.over:
                self._waiting[sequence.rank] = sequence
        self._running.clear()
        self._set_up()
