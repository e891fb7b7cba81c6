"""Between texts and tokens: requests for prompts, when texts end, and results with their texts."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.layouts import fit_cache
from llorch_jax.decoding.overflow import Reencode, padded
from llorch_jax.decoding.request import Request, prepare
from llorch_jax.decoding.steps import Alternatives, Generated
from llorch_jax.errors import ModelError, SamplerError, TokenError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import Sampler
from llorch_jax.text.stopping import StopMatcher, check_stops
from llorch_jax.text.timing import Timings
from llorch_jax.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]
TopLogprobs = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        text: the new text, without the prompt, an end-of-text token, or the stop string and what follows it.
        token_ids: of the new tokens; the id that ended the text, or completed the stop string, is the last.
        finish_reason: "stop" after an id or text that ends it, "length" after max_new_tokens.
        logprobs: natural log-probability of each new token under the model, before any setting of the sampler.
        prompt_ids: the prompt's tokens.
        timings: of the whole batch.
        stop_reason: the id or the stop string that ended the text, None after max_new_tokens.
        top_logprobs: for each new token the most likely ids with their log-probabilities; None where not asked for.
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
class Piece:
    """One step of a stream.

    Attributes:
        text: text that this step made certain; empty where a character is still incomplete or a stop string possible.
        token_id: the new token.
        logprob: its natural log-probability under the model.
        finish_reason: None but for the last piece.
        timings: of the stream so far.
        stop_reason: the id or the stop string that ended the text.
        top_logprobs: the most likely ids with their log-probabilities; None where not asked for.
    """

    text: str
    token_id: int
    logprob: float
    finish_reason: FinishReason | None
    timings: Timings
    stop_reason: int | str | None = None
    top_logprobs: TopLogprobs | None = None


@dataclasses.dataclass(frozen=True)
class Ending:
    """When texts end, beside the number of tokens.

    Attributes:
        ids: that end a row.
        stops: stop strings.
    """

    ids: tuple[int, ...]
    stops: tuple[str, ...]


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer, or a ModelError."""
    if model.tokenizer is None:
        raise ModelError(f"model {model.name}: expected a tokenizer, got none; use generate_tokens with token ids")
    return model.tokenizer


def prompt_list(prompt: str | list[str]) -> list[str]:
    """One prompt or several as a list."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list | tuple) or not prompt:
        got = "none" if isinstance(prompt, list | tuple) else type(prompt).__name__
        raise TokenError(f"prompt: expected a text or a list of texts, got {got}")
    return list(prompt)


def ending_of(model: Model, stop: str | Sequence[str] | None, stop_ids: Sequence[int]) -> Ending:
    """By the model's own end-of-text id, and these."""
    return Ending(tuple(dict.fromkeys((*model.config.eos_ids, *stop_ids))), check_stops(stop))


def key_of_seed(seed: int) -> jax.Array:
    """A random key, of the lowest 32 bits."""
    if not isinstance(seed, int | np.integer):
        raise SamplerError(f"seed: expected a whole number, got {seed!r}")
    return jax.random.key(int(seed) % 2**32)


def row_keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """A key per row: of one seed and the row's number, or of the row's own seed and number 0."""
    if isinstance(seed, int | np.integer) or not isinstance(seed, Sequence):
        return jax.vmap(jax.random.fold_in, (None, 0))(key_of_seed(seed), jnp.arange(count))
    if len(seed) != count:
        raise SamplerError(f"seed: expected one, or {count}, one per prompt, got {len(seed)}")
    return jax.vmap(jax.random.fold_in, (0, None))(jnp.stack([key_of_seed(each) for each in seed]), 0)


def text_request(
    model: Model,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    seed: int | Sequence[int],
    cache: str,
    overflow: str | Reencode,
    ending: Ending,
    top_logprobs: int,
) -> tuple[list[list[int]], Request]:
    """The prompts' tokens and the request for them."""
    tokenizer, config = tokenizer_of(model), model.config
    rows = [tokenizer.encode(text) for text in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise TokenError(f"prompt {i}: expected at least one token, got an empty text")
    tokens, lengths = padded(rows)
    keys = row_keys(seed, len(rows))
    needed = min(tokens.shape[1] + max(max_new_tokens, 1) - 1, config.n_positions)
    empty = fit_cache(config, cache, len(rows), needed)
    ids = ending.ids or None
    request = prepare(
        config, tokens, max_new_tokens, empty, lengths, sampler, keys, ids, overflow, top_logprobs=top_logprobs
    )
    return rows, request


def generation_of(model: Model, prompt_ids: list[int], generated: Generated, row: int, ending: Ending) -> Generation:
    """What row `row` got; its timings are to be filled in."""
    decoder, matcher = tokenizer_of(model).stream(), StopMatcher(ending.stops)
    ids, text, reason = [], "", None
    for token in np.asarray(generated.tokens[row]).tolist():
        ids.append(token)
        new, reason = advance(decoder, matcher, ending, token)
        text += new
        if reason is not None:
            break
    if reason is None:
        text += matcher.push(decoder.flush()) + matcher.flush()
        reason = matcher.found
    top = None if generated.top is None else jax.tree.map(lambda array: array[row, : len(ids)], generated.top)
    return Generation(
        text=text,
        token_ids=ids,
        finish_reason="length" if reason is None else "stop",
        logprobs=generated.logprobs[row][: len(ids)].tolist(),
        prompt_ids=prompt_ids,
        timings=Timings(0.0, 0.0, 0.0, 0),
        stop_reason=reason,
        top_logprobs=None
        if top is None
        else [id_logprobs(ids, logprobs) for ids, logprobs in zip(*on_host(top), strict=True)],
    )


def advance(decoder: StreamDecoder, matcher: StopMatcher, ending: Ending, token: int) -> tuple[str, int | str | None]:
    """The text that a token made certain, and the id or stop string by which it ended the text."""
    if token in ending.ids:
        text = matcher.push(decoder.flush())
        return text + matcher.flush(), token
    return matcher.push(decoder.push(token)), matcher.found


def on_host(top: Alternatives) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities as NumPy arrays."""
    return np.asarray(top.ids), np.asarray(top.logprobs)


def id_logprobs(ids: np.ndarray, logprobs: np.ndarray) -> TopLogprobs:
    """Ids with their log-probabilities."""
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))
