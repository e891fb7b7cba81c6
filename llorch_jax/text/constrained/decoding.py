"""Generation under constraints: a mask of allowed tokens is made on the host while the model computes their logits.

A step is two programs. `steps.decode` computes the logits that follow a token; it is dispatched first, and while it
runs the host finds out which tokens may come next. `steps.first_state` then samples from those.
"""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.config import GPT2Config
from llorch_jax.decoding import steps
from llorch_jax.decoding.overflow import Reencode
from llorch_jax.decoding.request import Request, following
from llorch_jax.decoding.steps import DecodeState, Generated
from llorch_jax.errors import ConstraintError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.params import Params
from llorch_jax.sampling import make_sampler
from llorch_jax.sampling.masking import Masked
from llorch_jax.text.constrained.constraint import Constraints, per_row
from llorch_jax.text.constrained.matching import Matcher, compiler_of
from llorch_jax.text.results import (
    Ending,
    FinishReason,
    Generation,
    Piece,
    ending_of,
    generation_of,
    id_logprobs,
    on_host,
    prompt_list,
    text_request,
    tokenizer_of,
)
from llorch_jax.text.timing import Stopwatch, Timings


class Rows:
    """The host's books on a batch: what may follow in each row, and which rows are complete.

    Attributes:
        complete: bool [B], rows that an id ended, or whose constraint allows nothing more.
        counts: int [B], tokens of each row so far, that which ended it included.
        mask: int32 [B, W], a new array for every step, as the one before may still be read.
    """

    def __init__(self, model: Model, constraints: Constraints, batch: int, eos_ids: tuple[int, ...]) -> None:
        compiler = compiler_of(tokenizer_of(model), model.config.vocab_size, eos_ids)
        self.matchers: list[Matcher | None] = [
            None if each is None else compiler.matcher(each, eos_ids) for each in per_row(constraints, batch)
        ]
        self.complete, self.counts = np.zeros(batch, bool), np.zeros(batch, int)
        self._eos_ids, self._words = eos_ids, compiler.words
        self.fill()
        if self.complete.any():
            raise ConstraintError("constraint: expected texts of one character or more, but stop_ids allow none")

    def push(self, tokens: np.ndarray) -> None:
        """Goes on by one token int32 [B] in the rows that are not complete."""
        for row, token in enumerate(tokens.tolist()):
            if self.complete[row]:
                continue
            self.counts[row] += 1
            matcher = self.matchers[row]
            self.complete[row] = token in self._eos_ids or (matcher is not None and not matcher.push(token))

    def fill(self) -> None:
        """Finds out what may follow; this may also show that a row is complete."""
        self.mask = np.full((len(self.matchers), self._words), -1, np.int32)
        for row, matcher in enumerate(self.matchers):
            if matcher is not None and not self.complete[row] and not matcher.fill(self.mask, row):
                self.complete[row], self.mask[row] = True, -1


def generate_constrained(
    model: Model,
    prompt: str | list[str],
    max_new_tokens: int,
    constraint: Constraints,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    cache: str = "static",
    overflow: str | Reencode = "error",
    stop: str | Sequence[str] | None = None,
    stop_ids: Sequence[int] = (),
    top_logprobs: int = 0,
    **settings: Any,
) -> Generation | list[Generation]:
    """What `generate` does where it is given a constraint; arguments and errors as there."""
    watch = Stopwatch()
    prompts, ending = prompt_list(prompt), _strict_ending(model, stop, stop_ids)
    sampler = make_sampler(temperature, **settings)
    ids, request = text_request(model, prompts, max_new_tokens, sampler, seed, cache, overflow, ending, top_logprobs)
    rows = Rows(model, constraint, len(prompts), ending.ids)
    parts, prefill_seconds = [], 0.0
    for state in constrained_states(model.params, model.config, request, rows):
        parts.append(jax.tree.map(np.array, Generated(state.token, state.logprob, state.top)))
        if len(parts) == 1:
            prefill_seconds = watch.lap()
    generated = jax.tree.map(lambda *steps: np.stack(steps, axis=1), *parts)
    timings = Timings(watch.compile, prefill_seconds, watch.lap(), len(parts))
    outputs = [_output(model, row, generated, rows, i, ending) for i, row in enumerate(ids)]
    outputs = [dataclasses.replace(out, timings=timings) for out in outputs]
    return outputs[0] if isinstance(prompt, str) else outputs


def stream_constrained(
    model: Model,
    prompt: str,
    max_new_tokens: int,
    constraint: Constraints,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    cache: str = "static",
    overflow: str | Reencode = "error",
    stop: str | Sequence[str] | None = None,
    stop_ids: Sequence[int] = (),
    top_logprobs: int = 0,
    **settings: Any,
) -> Generator[Piece, None, None]:
    """What `stream` does where it is given a constraint; arguments and errors as there."""
    watch = Stopwatch()
    ending = _strict_ending(model, stop, stop_ids)
    sampler = make_sampler(temperature, **settings)
    _, request = text_request(model, [prompt], max_new_tokens, sampler, seed, cache, overflow, ending, top_logprobs)
    rows = Rows(model, constraint, 1, ending.ids)
    states = constrained_states(model.params, model.config, request, rows)
    return _pieces(model, states, rows, max_new_tokens, ending, watch, prepare_seconds=watch.lap())


def constrained_states(params: Params, config: GPT2Config, request: Request, rows: Rows) -> Iterator[DecodeState]:
    """The states of a prepared request after each step, until all rows are complete; `rows` has them counted in.

    The cache of a state is donated by the next step, which may run already.
    """
    while True:
        new = []
        for state in _segment(params, config, request, rows):
            if request.later:
                new.append(np.array(state.token))
            yield state
        if request.later == 0 or rows.complete.all():
            return
        state = dataclasses.replace(state, finished=jnp.array(rows.complete))
        request = following(config, request, np.stack(new, 1), state)


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


def _strict_ending(model: Model, stop: str | Sequence[str] | None, stop_ids: Sequence[int]) -> Ending:
    """When texts end. A stop string would cut them where the constraint does not allow it."""
    if stop:
        raise ConstraintError(f"stop: expected none with a constraint, which says where a text ends, got {stop!r}")
    return ending_of(model, None, stop_ids)


def _output(model: Model, ids: list[int], generated: Generated, rows: Rows, row: int, ending: Ending) -> Generation:
    """What a row with the prompt `ids` got, without what stands behind its end; its timings are to be filled in."""
    own = jax.tree.map(lambda array: array[row : row + 1, : rows.counts[row]], generated)
    out = generation_of(model, ids, own, 0, ending)
    return dataclasses.replace(out, finish_reason="stop") if rows.complete[row] else out


def _pieces(
    model: Model,
    states: Iterator[DecodeState],
    rows: Rows,
    limit: int,
    ending: Ending,
    watch: Stopwatch,
    prepare_seconds: float,
) -> Generator[Piece, None, None]:
    decoder = tokenizer_of(model).stream()
    prefill_seconds, decode_seconds = prepare_seconds, 0.0
    watch.skip()  # what the caller did before asking for the first piece
    for count, state in enumerate(states, 1):
        # As NumPy arrays: an index into a JAX array is a program of its own, which would wait for the model's.
        token, logprob = int(np.asarray(state.token)[0]), float(np.asarray(state.logprob)[0])
        top = None if state.top is None else id_logprobs(*(array[0] for array in on_host(state.top)))
        if count == 1:
            prefill_seconds += watch.lap()
        else:
            decode_seconds += watch.lap()
        stopped = token if token in ending.ids else None
        complete = bool(rows.complete[0])
        text = "" if stopped is not None else decoder.push(token)
        if complete or count == limit:
            text += decoder.flush()
        reason: FinishReason | None = "stop" if complete else "length" if count == limit else None
        timings = Timings(watch.compile, prefill_seconds, decode_seconds, count)
        yield Piece(text, token, logprob, reason, timings, stopped, top)
        watch.skip()  # what the caller did with the piece
