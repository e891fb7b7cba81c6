"""The thread that owns the device: it runs the engine's loop and takes orders from other threads."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from llorch_jax.engine.core import Core
from llorch_jax.engine.sequences import Request, Sequence
from llorch_jax.errors import EngineError, EngineFullError

Value = TypeVar("Value")
_CLOSED = "engine: expected an open engine, got one that has been closed"


class Worker:
    """Runs a `Core` in its own thread. All methods may be called from any thread."""

    def __init__(self, make: Callable[[], Core], max_waiting: int) -> None:
        """Starts the thread and waits until it has made the core.

        Raises:
            Exception: whatever `make` raises.
        """
        self._max_waiting = max_waiting
        self._orders: deque[tuple[Callable[[Core], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._draining = True
        self._pending = 0  # requests submitted that the core has not seen yet
        ready: Future[Core] = Future()
        self._thread = threading.Thread(target=self._run, args=(make, ready), name="llorch_jax engine", daemon=True)
        self._thread.start()
        self._core = ready.result()

    def submit(self, request: Request) -> "Future[Sequence]":
        """Queues a request.

        Raises:
            EngineError: the engine is closed, or the maximum number of requests is waiting already.
            CapacityError: the request could never be answered.
        """
        self._core.check(request)
        with self._wake:
            waiting = self._core.waiting + self._pending
            if waiting >= self._max_waiting:
                raise EngineFullError(f"queue: expected fewer than {self._max_waiting} waiting requests, got {waiting}")
            self._pending += 1
            return self._order(lambda core: self._add(core, request))

    def cancel(self, sequence: Sequence) -> None:
        """Cancels a request; its pages are free before the next step. Does nothing if it has already ended."""
        with self._wake:
            if self._thread.is_alive():
                self._orders.append((lambda core: core.withdraw(sequence), Future()))
                self._wake.notify_all()

    def call(self, function: Callable[[Core], Value]) -> Value:
        """Calls a function between two steps, in the engine's thread, and returns its result.

        Raises:
            EngineError: the engine is closed.
        """
        with self._wake:
            future = self._order(function)
        return future.result()

    def close(self, *, drain: bool, timeout: float | None) -> None:
        """Stops accepting requests, and ends the thread once those in progress have been answered or abandoned.

        Args:
            drain: whether to answer the requests in progress.
            timeout: seconds after which they are abandoned; None for no limit.
        """
        with self._wake:
            self._closing = True
            self._draining = drain
            self._wake.notify_all()
        self._thread.join(timeout if drain else None)
        if self._thread.is_alive():
            with self._wake:
                self._draining = False
                self._wake.notify_all()
            self._thread.join()

    def _order(self, function: Callable[[Core], Value]) -> "Future[Value]":
        if self._closing:
            raise EngineError(_CLOSED)
        future: Future[Value] = Future()
        self._orders.append((function, future))
        self._wake.notify_all()
        return future

    def _add(self, core: Core, request: Request) -> Sequence:
        with self._wake:
            self._pending -= 1
        return core.add(request)

    def _run(self, make: Callable[[], Core], ready: "Future[Core]") -> None:
        try:
            core = make()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(core)
        while self._obey(core):
            core.step()
        core.fail_all(EngineError("engine: the request was abandoned because the engine was closed"))

    def _obey(self, core: Core) -> bool:
        """Carries out orders, waiting for one if there is nothing else to do; returns whether to continue."""
        while True:
            with self._wake:
                while not self._orders and core.idle and not self._closing:
                    self._wake.wait()
                orders = list(self._orders)
                self._orders.clear()
                closing = self._closing
            for function, future in orders:
                try:
                    future.set_result(function(core))
                except BaseException as error:
                    future.set_exception(error)
            if closing and (core.idle or not self._draining):
                return False
            if not core.idle:
                return True
