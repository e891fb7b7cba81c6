"""Handles: a request as its caller sees it, readable from threads and from event loops."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from llorch_jax.decoding.steps import Alternatives
from llorch_jax.decoding.streaming import Step
from llorch_jax.engine.sequences import Sequence, Token
from llorch_jax.engine.worker import Worker
from llorch_jax.text.collecting import Growing
from llorch_jax.text.results import Generation, Piece
from llorch_jax.text.timing import Timings


class Handle:
    """A request in an engine. Several readers may iterate over it; each gets all pieces."""

    def __init__(self, growing: Growing, notify: "Callable[[Handle], None] | None" = None) -> None:
        self._growing = growing
        self._notify = notify
        self._pieces: list[Piece] = []
        self._error: BaseException | None = None
        self._result: Generation | None = None
        self._changed = threading.Condition()
        self._loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._started = time.perf_counter()
        self._first = 0.0
        self._worker: Worker | None = None
        self._sequence: Future[Sequence] | None = None

    def attach(self, worker: Worker, sequence: "Future[Sequence]") -> None:
        """Says who answers the request."""
        self._worker = worker
        self._sequence = sequence

    @property
    def done(self) -> bool:
        """Whether the request has ended, failed or been cancelled."""
        return self._result is not None or self._error is not None

    @property
    def failed(self) -> bool:
        """Whether the request has ended without a result."""
        return self._error is not None

    @property
    def count(self) -> int:
        """Number of new tokens so far."""
        return len(self._pieces)

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the prompt's tokens."""
        return self._growing.prompt_ids

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that the prefix cache had."""
        if self._sequence is None or not self._sequence.done():
            return 0
        return self._sequence.result().cached or 0

    @property
    def text(self) -> str:
        """The text so far."""
        return self._growing.transcript.text

    def __iter__(self) -> Iterator[Piece]:
        """The pieces of text, each as soon as it is generated.

        Raises:
            EngineError: the request was cancelled, missed its deadline, or could not be answered.
        """
        number = 0
        while True:
            with self._changed:
                while len(self._pieces) == number and not self.done:
                    self._changed.wait()
            while number < len(self._pieces):
                yield self._pieces[number]
                number += 1
            if self.done and number == len(self._pieces):
                break
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """As `__iter__`, without blocking the event loop."""
        number = 0
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        with self._changed:
            self._loops.append((loop, event))
        try:
            while True:
                event.clear()
                while number < len(self._pieces):
                    yield self._pieces[number]
                    number += 1
                if self.done and number == len(self._pieces):
                    break
                if len(self._pieces) == number:
                    await event.wait()
        finally:
            with self._changed:
                self._loops.remove((loop, event))
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Generation:
        """The whole result, once it is there.

        Args:
            timeout: seconds to wait; None for no limit.

        Raises:
            TimeoutError: it is not there in time; the request goes on.
            EngineError: the request was cancelled, missed its deadline, or could not be answered.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"result: expected one within {timeout} s, got {len(self._pieces)} tokens so far")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    async def wait(self) -> Generation:
        """`result`, without blocking the event loop."""
        async for _ in self:
            pass
        return self.result()

    def cancel(self) -> None:
        """Gives the request up, unless it has ended: its slot and pages are free before the next step.

        Whoever reads the handle gets an EngineError after the pieces that are there.
        """
        if self._worker is None or self._sequence is None or self.done:
            return
        worker = self._worker
        self._sequence.add_done_callback(lambda future: worker.cancel(future.result()))

    def take(self, token: Token) -> bool:
        """Adds a new token, and tells whether more are wanted; called by the engine."""
        if not self._pieces:
            self._first = time.perf_counter()
        text = self._growing.push(_step(token), 0)
        now = time.perf_counter()
        timings = Timings(0.0, self._first - self._started, now - self._first, len(self._pieces) + 1)
        piece = self._growing.piece(text, timings)
        ended = piece.finish_reason is not None
        with self._changed:
            self._pieces.append(piece)
            if ended:
                self._result = self._growing.generation(timings)
            self._tell()
        return not ended

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error; called by the engine."""
        with self._changed:
            self._error = error
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for loop, event in self._loops:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)
        if self._notify is not None:
            self._notify(self)


def _step(token: Token) -> Step:
    """A token as a step of a batch of one row."""
    top: Any = None
    if token.top is not None:
        ids, logprobs = zip(*token.top, strict=True)
        top = Alternatives(np.asarray([ids], np.int32), np.asarray([logprobs], np.float32))
    row = np.array
    return Step(row([token.id]), row([token.logprob], np.float32), top, row([token.ended]), row([token.last]))
