"""Decoding step by step, several steps per call of the compiled loop, with the next call under way.

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
        token: int32 [B]; the (first) end-of-text id in rows that have ended.
        logprob: float32 [B].
        top: `Alternatives` [B, n], where they were asked for.
        finished: bool [B], rows that have ended, with this token or before.
        part: how often the text has been re-encoded before.
    """

    token: np.ndarray
    logprob: np.ndarray
    top: Any
    finished: np.ndarray
    part: int = 0


def stream_steps(params: Params, config: GPT2Config, request: Request) -> Generator[Step, None, KVCache]:
    """The steps of a prepared request, as soon as each block of them is there; the first one by itself.

    Closing the generator frees the cache, after the blocks that are under way.

    Returns:
        The cache, as the generator's return value.
    """
    part = 0
    while True:
        new = []
        segment = Segment(params, config, request)
        for step in segment.run():
            if request.later:
                new.append(step.token)
            yield step._replace(part=part)
        if request.later == 0 or step.finished.all():
            return segment.state.cache
        request, part = following(config, request, np.stack(new, 1), segment.state), part + 1


class Segment:
    """The steps of a request until the context is full or all rows have ended; in the end `state` is the last one."""

    def __init__(self, params: Params, config: GPT2Config, request: Request) -> None:
        self._params, self._config, self._policy = params, config, request.policy
        self._left, self._room, self._size = request.max_new_tokens - 1, 0, 1
        self._under_way: deque[tuple[steps.Generated, int]] = deque()
        self._spare: list[steps.Generated] = []
        logits, cache = steps.first_logits(params, config, request)
        self.state = steps.begin(request, logits, cache)

    def run(self) -> Generator[Step, None, None]:
        state = self.state
        # Copies: the next block takes the state's buffers over.
        first = jax.tree.map(np.array, (state.token, state.logprob, state.top, state.finished))
        finished = first[-1]
        yield Step(*first)
        del state, first
        eos_ids = np.asarray(self._policy.eos_ids)
        while (self._left or self._under_way) and not finished.all():
            for step in self._next_block():
                finished = finished | np.isin(step.token, eos_ids)
                yield step._replace(finished=finished)
                if finished.all():
                    return

    def _next_block(self) -> list[Step]:
        """Waits for the oldest block, with another one in the queue behind it."""
        start = time.perf_counter()
        while self._left and len(self._under_way) < 2:
            self._dispatch()
        out, count = self._under_way.popleft()
        block = jax.tree.map(np.array, out)  # copies: the buffers are used again
        self._spare.append(out)
        if time.perf_counter() - start < SHORT:
            self._size = min(2 * self._size, LONGEST)
        none = np.zeros(0, bool)
        columns = [jax.tree.map(lambda array, column=column: array[:, column], block) for column in range(count)]
        return [Step(each.tokens, each.logprobs, each.top, none) for each in columns]

    def _dispatch(self) -> None:
        """Puts the next block in the queue."""
        if self._room == 0:
            self.state = steps.with_room(self.state)
            self._room = self.state.cache.room()
        count = min(self._size, self._left, self._room)
        batch = self.state.token.shape[0]
        out = self._spare.pop() if self._spare else steps.filler(self._policy, batch, LONGEST)
        span = jnp.asarray([0, count], jnp.int32)
        out, self.state = steps.loop(self._params, self._config, self._policy, out, self.state, span)
        self._under_way.append((out, count))
        self._left, self._room = self._left - count, self._room - count
