"""Decoding step by step, several steps per call of the compiled loop, with the next call already running.

A call of a compiled program costs a millisecond or two of the host's time. While the device works on one block of steps
the next is already in its queue, and blocks grow as long as they are short, so that neither waits for the other.
"""

import time
from collections import deque
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding import steps
from llorch_jax.decoding.request import Request, following
from llorch_jax.params import Params

LONGEST = 8  # steps of a block
SHORT = 0.025  # seconds; a block that takes less is followed by one twice as long


class Step(NamedTuple):
    """One new token per row, on the host.

    Attributes:
        token: int32 [B]; the row's (first) end-of-text id, or 0, in rows that are done.
        logprob: float32 [B].
        top: `Alternatives` [B, n], where they were asked for.
        finished: bool [B], rows that an end-of-text id has ended, with this token or before; in constrained decoding
            also rows whose constraint allows nothing more.
        done: bool [B], rows that get no more tokens: they are finished, or have as many as they may get.
        part: the number of times that the text has been re-encoded before.
    """

    token: np.ndarray
    logprob: np.ndarray
    top: Any
    finished: np.ndarray
    done: np.ndarray
    part: int = 0


def stream_steps(params: Params, config: GPT2Config, request: Request) -> Generator[Step, None, KVCache]:
    """The steps of a prepared request, as soon as each block of them is there; the first one by itself.

    Closing the generator frees the cache, after the running blocks.

    Returns:
        The cache, as the generator's return value.

    Raises:
        SamplerError, NonFiniteError: see `steps.check_chosen`.
    """
    part = 0
    while True:
        new = []
        segment = Segment(params, config, request)
        for step in segment.run():
            if request.later:
                new.append(step.token)
            yield step._replace(part=part)
        if request.later == 0 or step.done.all():
            return segment.state.cache
        request = following(config, request, np.stack(new, 1), segment.state)
        part += 1


class Segment:
    """The steps of a request until the context is full or all rows are done; `state` is then the last state."""

    def __init__(self, params: Params, config: GPT2Config, request: Request) -> None:
        self._params = params
        self._together = params.mesh is not None and params.mesh.is_multi_process
        self._config = config
        self._decoding = request.decoding
        self._left = request.max_new_tokens - 1  # steps not yet in the queue
        self._room = 0  # steps that the cache has room for
        self._size = 1  # of the next block
        self._finished = request.finished
        self._remaining = request.remaining
        self._under_way: deque[tuple[steps.Generated, int]] = deque()
        self._spare: list[steps.Generated] = []
        self.state = steps.start(params, config, request)

    def run(self) -> Generator[Step, None, None]:
        """The steps; raises what `steps.check_chosen` does."""
        state = self.state
        # Copies: the next block takes the state's buffers over.
        first = jax.tree.map(np.array, steps.Generated(state.token, state.logprob, state.top))
        del state
        step = self._taken(first)
        yield step
        while (self._left or self._under_way) and not step.done.all():
            for new in self._next_block():
                step = self._taken(new)
                yield step
                if step.done.all():
                    return

    def _taken(self, new: steps.Generated) -> Step:
        """A step of one token per row [B], after noting which rows it ends."""
        steps.check_chosen(new.tokens[:, None], new.logprobs[:, None])
        going = ~self._finished & (self._remaining > 0)
        self._finished = self._finished | (going & self._decoding.ends_on_host(new.tokens))
        self._remaining = self._remaining - going
        done = self._finished | (self._remaining <= 0)
        return Step(new.tokens, new.logprobs, new.top, self._finished, done)

    def _next_block(self) -> list[steps.Generated]:
        """Waits for the oldest block, with another one queued after it, and returns its steps."""
        start = time.perf_counter()
        while self._left and len(self._under_way) < 2:
            self._dispatch()
        out, count = self._under_way.popleft()
        block = jax.tree.map(np.array, out)  # copies: the buffers are used again
        self._spare.append(out)
        # Several processes must queue the same blocks, and may not go by their clocks.
        if self._together or time.perf_counter() - start < SHORT:
            self._size = min(2 * self._size, LONGEST)
        return [jax.tree.map(lambda array, column=column: array[:, column], block) for column in range(count)]

    def _dispatch(self) -> None:
        """Puts the next block in the queue."""
        if self._room == 0:
            self.state, self._room = steps.with_room(self._params, self.state)
        count = min(self._size, self._left, self._room)
        out = self._spare.pop() if self._spare else steps.filler(self._decoding, LONGEST)
        span = jnp.asarray([0, count], jnp.int32)
        out, self.state = steps.loop(self._params, self._config, self._decoding, out, self.state, span)
        self._under_way.append((out, count))
        self._left -= count
        self._room -= count
