"""From steps to texts: the pieces of a stream, and the results of a batch."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llorch_jax.decoding.steps import Generated
from llorch_jax.decoding.streaming import Step
from llorch_jax.text.ending import Ending, Transcript
from llorch_jax.text.results import Generation, Piece, TopLogprobs
from llorch_jax.text.timing import Stopwatch, Timings
from llorch_jax.tokenizer import Tokenizer


class Growing:
    """What one row of a batch has got so far.

    Attributes:
        transcript: its text.
        prompt_ids: ids of the prompt's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, ending: Ending, prompt_ids: list[int]) -> None:
        self.transcript = Transcript(tokenizer, ending)
        self.prompt_ids = prompt_ids
        self._logprobs: list[float] = []
        self._top: list[TopLogprobs] | None = None

    def push(self, step: Step, row: int) -> str:
        """Adds row `row` of a step, and returns the text that it completes."""
        token = int(step.token[row])
        self._logprobs.append(float(step.logprob[row]))
        if step.top is not None:
            ids = np.asarray(step.top.ids)[row].tolist()
            logprobs = np.asarray(step.top.logprobs)[row].tolist()
            if self._top is None:
                self._top = []
            self._top.append(list(zip(ids, logprobs, strict=True)))
        return self.transcript.push(token, complete=bool(step.finished[row]))

    def piece(self, text: str, timings: Timings) -> Piece:
        """The piece of a stream whose text the newest token made certain."""
        grown = self.transcript
        top = None if self._top is None else self._top[-1]
        return Piece(
            text, grown.token_ids[-1], self._logprobs[-1], grown.finish_reason, timings, grown.stop_reason, top
        )

    def generation(self, timings: Timings) -> Generation:
        """The result, once the text has ended."""
        grown = self.transcript
        assert grown.finish_reason is not None
        return Generation(
            text=grown.text,
            token_ids=grown.token_ids,
            finish_reason=grown.finish_reason,
            logprobs=self._logprobs,
            prompt_ids=self.prompt_ids,
            timings=timings,
            stop_reason=grown.stop_reason,
            top_logprobs=self._top,
        )


def collect(
    steps: Iterable[Step], rows: Sequence[Growing], watch: Stopwatch, prefill_seconds: float | None = None
) -> list[Generation]:
    """The results of a batch once all its rows have ended; what comes after a row's end is left out.

    Args:
        steps: of the batch.
        rows: what each has got so far.
        watch: of the call.
        prefill_seconds: None where the first step includes the prefill.
    """
    for step in steps:
        if prefill_seconds is None:
            prefill_seconds = watch.lap()
        for number, row in enumerate(rows):
            if row.transcript.finish_reason is None:
                row.push(step, number)
        if all(row.transcript.finish_reason for row in rows):
            break
    count = max(len(row.transcript.token_ids) for row in rows)
    timings = Timings(watch.compile, prefill_seconds or 0.0, watch.lap(), count)
    return [row.generation(timings) for row in rows]


def pieces(
    steps: Iterator[Step], row: Growing, watch: Stopwatch, prefill_seconds: float
) -> Generator[Piece, None, None]:
    """The pieces of a stream of one row; time that the caller spends between them does not count."""
    decode_seconds = 0.0
    watch.skip()
    for count, step in enumerate(steps, 1):
        if count == 1:
            prefill_seconds += watch.lap()
        else:
            decode_seconds += watch.lap()
        text = row.push(step, 0)
        yield row.piece(text, Timings(watch.compile, prefill_seconds, decode_seconds, count))
        if row.transcript.finish_reason is not None:
            return
        watch.skip()


def steps_of(generated: Generated, eos_ids: Sequence[int]) -> Iterator[Step]:
    """The steps of tokens that have all been generated."""
    tokens, logprobs, top = (_columns(each) for each in (generated.tokens, generated.logprobs, generated.top))
    finished = np.logical_or.accumulate(np.isin(np.asarray(generated.tokens), eos_ids), axis=1)
    for column, token in enumerate(tokens):
        alternatives = None if generated.top is None else top[column]
        done = finished[:, column] | (column == len(tokens) - 1)
        yield Step(token, logprobs[column], alternatives, finished[:, column], done)


def _columns(arrays: Any) -> list[Any]:
    """A pytree of arrays [B, N, ...] as N pytrees of arrays [B, ...]."""
    if arrays is None:
        return []
    known = jax.tree.map(np.asarray, arrays)
    count = jax.tree.leaves(known)[0].shape[1]
    return [jax.tree.map(lambda array, column=column: array[:, column], known) for column in range(count)]
