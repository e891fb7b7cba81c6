"""Generation under constraints: a mask of allowed tokens is made on the host while the model computes their logits.

A step is two programs. `steps.decode` computes the logits that follow a token; it is dispatched first, and while it
runs the host finds out which tokens may come next. `steps.first_state` then samples from those.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.config import GPT2Config
from llorch_jax.decoding import steps
from llorch_jax.decoding.request import Request, following
from llorch_jax.decoding.steps import DecodeState
from llorch_jax.decoding.streaming import Step
from llorch_jax.errors import ConstraintError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.params import Params
from llorch_jax.sampling.masking import Masked
from llorch_jax.text.constrained.constraint import Constraints, per_row
from llorch_jax.text.constrained.matching import Matcher, compiler_of
from llorch_jax.text.prompts import Batch
from llorch_jax.text.vocabulary import tokenizer_of


class Rows:
    """The host's books on a batch: what may follow in each row, and which rows are complete.

    Attributes:
        complete: bool [B], rows that an id ended, or whose constraint allows nothing more.
        mask: int32 [B, W], a new array for every step, as the one before may still be read.
    """

    def __init__(self, model: Model, constraints: Constraints, batch: int, eos_ids: tuple[int, ...]) -> None:
        compiler = compiler_of(tokenizer_of(model), model.config.vocab_size, eos_ids)
        self.matchers: list[Matcher | None] = [
            None if each is None else compiler.matcher(each, eos_ids) for each in per_row(constraints, batch)
        ]
        self.complete = np.zeros(batch, bool)
        self._eos_ids, self._words = eos_ids, compiler.words
        self.fill()
        if self.complete.any():
            raise ConstraintError("constraint: expected texts of one character or more, but stop_ids allow none")

    def push(self, tokens: np.ndarray) -> None:
        """Goes on by one token int32 [B] in the rows that are not complete."""
        for row, token in enumerate(tokens.tolist()):
            if self.complete[row]:
                continue
            matcher = self.matchers[row]
            self.complete[row] = token in self._eos_ids or (matcher is not None and not matcher.push(token))

    def fill(self) -> None:
        """Finds out what may follow; this may also show that a row is complete."""
        self.mask = np.full((len(self.matchers), self._words), -1, np.int32)
        for row, matcher in enumerate(self.matchers):
            if matcher is not None and not self.complete[row] and not matcher.fill(self.mask, row):
                self.complete[row], self.mask[row] = True, -1


def constrained_steps(model: Model, batch: Batch, constraints: Constraints) -> Iterator[Step]:
    """The steps of a batch under constraints; rows are finished as soon as their constraint allows nothing more.

    Raises:
        ConstraintError: a constraint is invalid; at once, and not at the first step.
    """
    rows = Rows(model, constraints, len(batch.rows), batch.ending.ids)
    return _steps(model.params, model.config, batch.request, rows)


def _steps(params: Params, config: GPT2Config, request: Request, rows: Rows) -> Iterator[Step]:
    """The steps of a prepared request, across re-encodings, until all rows are complete."""
    part = 0
    while True:
        new = []
        for state in _segment(params, config, request, rows):
            token, logprob, top = jax.tree.map(np.array, (state.token, state.logprob, state.top))
            step = Step(token, logprob, top, rows.complete.copy(), part)
            if request.later:
                new.append(step.token)
            yield step
        if request.later == 0 or rows.complete.all():
            return
        state = dataclasses.replace(state, finished=jnp.array(rows.complete))
        request = following(config, request, np.stack(new, 1), state)
        part += 1


def _segment(params: Params, config: GPT2Config, request: Request, rows: Rows) -> Iterator[DecodeState]:
    """The states until the context is full or all rows are complete."""
    logits, cache = steps.first_logits(params, config, request)
    history, memory, room = request.history, request.memory, 0
    for left in range(request.max_new_tokens - 1, -1, -1):
        sampler = Masked(request.policy.sampler, rows.mask)
        policy = dataclasses.replace(request.policy, sampler=sampler)
        state = steps.first_state(policy, logits, rows.complete.copy(), cache, history, memory)
        cache, history, memory = state.cache, state.history, state.memory
        rows.push(np.asarray(state.token))
        if left and not rows.complete.all():
            if room == 0:
                cache = cache.reserve(1)
                room = cache.room()
            logits, cache = steps.decode(params, config, state.token, cache)
            room -= 1
        if left or request.later:
            rows.fill()  # while the logits are computed
        yield state
        if rows.complete.all():
            return
