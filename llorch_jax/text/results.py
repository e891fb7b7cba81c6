"""Results of text generation."""

import dataclasses

from llorch_jax.text.ending import FinishReason
from llorch_jax.text.timing import Timings

TopLogprobs = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        text: the new text, without the prompt, an end-of-text token, or the stop string and what follows it.
        token_ids: ids of the new tokens; the id that ended the text, or completed the stop string, is the last.
        finish_reason: "stop" after an id or text that ends it, "length" after max_new_tokens.
        logprobs: natural log-probability of each new token under the model, before any setting of the sampler.
        prompt_ids: ids of the prompt's tokens.
        timings: of the whole batch.
        stop_reason: the id or the stop string that ended the text, None after max_new_tokens.
        top_logprobs: for each new token the most likely ids with their log-probabilities; None if not asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float]
    prompt_ids: list[int]
    timings: Timings
    stop_reason: int | str | None = None
    top_logprobs: list[TopLogprobs] | None = None


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """How likely the tokens of a prompt are.

    Attributes:
        token_ids: ids of the prompt's tokens.
        logprobs: natural log-probability of each after those before it; None for the first, which has none before it.
        top_logprobs: for each token but the first the most likely ids in its place, with their log-probabilities.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[TopLogprobs | None]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One step of a stream.

    Attributes:
        text: text that this step made certain; empty while a character is incomplete or a stop string possible.
        token_id: the new token.
        logprob: its natural log-probability under the model.
        finish_reason: None except in the last piece.
        timings: of the stream so far.
        stop_reason: the id or the stop string that ended the text.
        top_logprobs: the most likely ids with their log-probabilities; None if not asked for.
    """

    text: str
    token_id: int
    logprob: float
    finish_reason: FinishReason | None
    timings: Timings
    stop_reason: int | str | None = None
    top_logprobs: TopLogprobs | None = None
