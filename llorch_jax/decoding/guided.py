"""Decoding under a guide: the host says before each step which tokens may come next.

A step is two programs. The first computes the logits that follow a token; it is dispatched, and while it runs the host
finds out which tokens may come next. The second samples from those.
"""

import dataclasses
from collections.abc import Generator
from typing import Protocol

import jax
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.cache.placement import placed
from llorch_jax.config import GPT2Config
from llorch_jax.decoding import steps
from llorch_jax.decoding.request import Request, following
from llorch_jax.decoding.streaming import Step
from llorch_jax.params import Params
from llorch_jax.sampling.masking import Masked


class Guide(Protocol):
    """The host's record of a batch: what may follow in each row, and which rows are complete.

    Attributes:
        complete: bool [B], rows that an id has ended, or in which nothing more may follow.
        mask: int32 [B, ceil(V / 32)], the tokens that may come next, see `Masked`; a new array for every step, as the
            one before may still be read.
        insists: bool [B], rows in which the mask wins over settings that exclude all that it allows.
    """

    complete: np.ndarray
    mask: np.ndarray
    insists: np.ndarray

    def push(self, tokens: np.ndarray, going: np.ndarray) -> None:
        """Advances by one token, int32 [B], in the rows where `going` bool [B] is true; elsewhere it is filler."""
        ...

    def fill(self) -> None:
        """Makes the mask of the next step; this may also show that a row is complete."""
        ...


def guided_steps(params: Params, config: GPT2Config, request: Request, guide: Guide) -> Generator[Step, None, KVCache]:
    """As `stream_steps`, restricted to the tokens that a guide allows; `Step.finished` is `guide.complete`.

    Args:
        params: of the model.
        config: the model's hyperparameters.
        request: from `prepare`.
        guide: filled for the first token.

    Returns:
        The cache, as the generator's return value.

    Raises:
        NonFiniteError: see `steps.check_chosen`.
    """
    part = 0
    while True:
        new = []
        segment = _Segment(params, config, request, guide)
        for step in segment.run():
            if request.later:
                new.append(step.token)
            yield step._replace(part=part)
        if request.later == 0 or step.done.all():
            return segment.state.cache
        state = dataclasses.replace(segment.state, finished=guide.complete.copy())
        request = following(config, request, np.stack(new, 1), state)
        part += 1


class _Segment:
    """The steps of a request until the context is full or all rows are done; `state` is then the last state."""

    def __init__(self, params: Params, config: GPT2Config, request: Request, guide: Guide) -> None:
        self._params = params
        self._config = config
        self._request = request
        self._guide = guide
        self._room = 0
        self.state = self._chosen(request, *steps.first_logits(params, config, request))

    def run(self) -> Generator[Step, None, None]:
        """The steps."""
        going = ~self._guide.complete & (self._request.remaining > 0)
        for left in range(self._request.max_new_tokens - 1, -1, -1):
            token = np.array(self.state.token)
            logprob = np.array(self.state.logprob)
            steps.check_chosen(token[:, None], logprob[:, None])
            top = None if self.state.top is None else jax.tree.map(np.array, self.state.top)
            remaining = np.array(self.state.remaining)
            self._guide.push(token, going)
            going = ~self._guide.complete & (remaining > 0)
            again = left > 0 and bool(going.any())
            if again:
                logits, cache = self._fed(going)
            if again or self._request.later:
                self._guide.fill()  # while the logits are computed
            finished = self._guide.complete.copy()
            done = finished | (remaining <= 0)
            if again and not done.all():
                request = dataclasses.replace(
                    self._request,
                    remaining=remaining,
                    history=self.state.history,
                    sampler_state=self.state.sampler_state,
                )
                self.state = self._chosen(request, logits, cache)
            elif again:
                self.state = dataclasses.replace(self.state, cache=cache)
            yield Step(token, logprob, top, finished, done)
            if done.all():
                return

    def _fed(self, going: np.ndarray) -> tuple[jax.Array, KVCache]:
        """The logits after the newest token of the rows that are not done, and the cache with it."""
        cache = self.state.cache
        if self._room == 0:
            cache = placed(self._params.mesh, cache.reserve(going.astype(np.int32)))
            self._room = cache.room(going)
        self._room -= 1
        return steps.feed_active(self._params, self._config, self.state.token, cache, going)

    def _chosen(self, request: Request, logits: jax.Array, cache: KVCache) -> steps.DecodeState:
        """The state after sampling one of the tokens that the guide allows."""
        sampler = Masked(request.decoding.sampler, self._guide.mask, self._guide.insists)
        decoding = dataclasses.replace(request.decoding, sampler=sampler)
        request = dataclasses.replace(request, decoding=decoding, finished=self._guide.complete.copy())
        return steps.begin(request, logits, cache)
