"""Generation under constraints: a mask of allowed tokens is made on the host while the model computes their logits."""

from collections.abc import Iterator

import numpy as np

from llorch_jax.decoding.guided import guided_steps
from llorch_jax.decoding.streaming import Step
from llorch_jax.errors import ConstraintError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.constrained.constraint import Constraints, per_row
from llorch_jax.text.constrained.matching import Matcher, compiler_of
from llorch_jax.text.prompts import Batch
from llorch_jax.text.vocabulary import tokenizer_of


class Rows:
    """What may follow in each row of a batch, and which rows are complete: a `Guide` of constraints.

    Attributes:
        complete: bool [B], rows that an id has ended, or whose constraint allows nothing more.
        mask: int32 [B, W], a new array for every step, as the one before may still be read.
        insists: bool [B], rows that have a constraint.
    """

    def __init__(self, model: Model, constraints: Constraints, batch: int, eos_ids: tuple[int, ...]) -> None:
        compiler = compiler_of(tokenizer_of(model), model.config.vocab_size, eos_ids)
        self.matchers: list[Matcher | None] = [
            None if each is None else compiler.matcher(each, eos_ids) for each in per_row(constraints, batch)
        ]
        self.complete = np.zeros(batch, bool)
        self.insists = np.array([matcher is not None for matcher in self.matchers])
        self._eos_ids = eos_ids
        self._words = compiler.words
        self.fill()
        if self.complete.any():
            raise ConstraintError("constraint: expected texts of one character or more, but stop_ids allow none")

    def push(self, tokens: np.ndarray, going: np.ndarray) -> None:
        """Takes one token int32 [B] in the rows that are `going` on, bool [B]."""
        for row in np.flatnonzero(going).tolist():
            token = int(tokens[row])
            matcher = self.matchers[row]
            self.complete[row] = token in self._eos_ids or (matcher is not None and not matcher.push(token))

    def fill(self) -> None:
        """Makes the mask of the next step; this may also show that a row is complete."""
        self.mask = np.full((len(self.matchers), self._words), -1, np.int32)
        for row, matcher in enumerate(self.matchers):
            if matcher is not None and not self.complete[row] and not matcher.fill(self.mask, row):
                self.complete[row] = True
                self.mask[row] = -1


def constrained_steps(model: Model, batch: Batch, constraints: Constraints) -> Iterator[Step]:
    """The steps of a batch under constraints; rows are finished as soon as their constraint allows nothing more.

    Raises:
        ConstraintError: a constraint is invalid; at once, and not at the first step.
    """
    rows = Rows(model, constraints, len(batch.rows), batch.eos_ids)
    return guided_steps(model.params, model.config, batch.request, rows)
