"""Text in, text out: generate, stream and score."""

import dataclasses
from collections.abc import Generator, Iterator
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.memory import fit_cache
from llorch_jax.checkpoint import Model
from llorch_jax.decoding import first_logits, generate_from, stream_states
from llorch_jax.errors import LlorchError, TokenError
from llorch_jax.overflow import Reencode, padded
from llorch_jax.request import Request, prepare
from llorch_jax.sampling import Greedy, Sampler, SamplerError, Sampling
from llorch_jax.steps import DecodeState, Generated
from llorch_jax.timing import Stopwatch, Timings
from llorch_jax.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


class ModelError(LlorchError):
    """A model lacks what a call needs, such as a tokenizer."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        text: the new text, without the prompt and without an end-of-text token.
        token_ids: of the new tokens; the end-of-text id, where there is one, is the last.
        finish_reason: "stop" after an end-of-text id, "length" after max_new_tokens.
        logprobs: natural log-probability of each new token under the model, before temperature, top-k and top-p.
        prompt_ids: the prompt's tokens.
        timings: of the whole batch.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float]
    prompt_ids: list[int]
    timings: Timings


@dataclasses.dataclass(frozen=True)
class Piece:
    """One step of a stream.

    Attributes:
        text: text that this step made certain; empty where a character is still incomplete.
        token_id: the new token.
        logprob: its natural log-probability under the model.
        finish_reason: None but for the last piece.
        timings: of the stream so far.
    """

    text: str
    token_id: int
    logprob: float
    finish_reason: FinishReason | None
    timings: Timings


@overload
def generate(
    model: Model,
    prompt: str,
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int = ...,
    cache: str = ...,
    overflow: str | Reencode = ...,
) -> Generation: ...
@overload
def generate(
    model: Model,
    prompt: list[str],
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int = ...,
    cache: str = ...,
    overflow: str | Reencode = ...,
) -> list[Generation]: ...
def generate(
    model: Model,
    prompt: str | list[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: str = "static",
    overflow: str | Reencode = "error",
) -> Generation | list[Generation]:
    """Continues a prompt, or a batch of prompts.

    Args:
        model: from `load`.
        prompt: a text, or several, which then run as one batch.
        max_new_tokens: how many tokens each gets at most.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: draw from this many most likely tokens.
        top_p: draw from the most likely tokens that reach this probability.
        seed: of the draws; the same seed gives the same text. Of larger numbers the lowest 32 bits count.
        cache: layout of the KV cache: static, dynamic, rotating:WINDOW[+SINKS], paged[:PAGE_SIZE], int8 or int4.
        overflow: "error" refuses texts that would outgrow the context; "reencode" (or a `Reencode`) goes on with the
            first and newest tokens, as `generate_tokens` does.

    Returns:
        A `Generation`, or a list of them where `prompt` is a list.

    Raises:
        ModelError: the model has no tokenizer.
        TokenError: a prompt is empty or holds what the tokenizer has no token for.
        CapacityError: a prompt and its new tokens do not fit the model's context.
        SamplerError: a setting is out of range.
    """
    watch = Stopwatch()
    prompts = _prompts(prompt)
    sampler = make_sampler(temperature, top_k, top_p)
    rows, request = _request(model, prompts, max_new_tokens, sampler, seed, cache, overflow)
    logits, cache_after = first_logits(model.params, model.config, request)
    jax.block_until_ready(logits)
    prefill_seconds = watch.lap()
    generated, _ = generate_from(model.params, model.config, request, logits, cache_after)
    generated = jax.device_get(generated)
    decode_seconds = watch.lap()
    count = max(_count(model, row) for row in generated.tokens)
    timings = Timings(watch.compile, prefill_seconds, decode_seconds, count)
    outputs = [_generation(model, row, generated, i, timings) for i, row in enumerate(rows)]
    return outputs[0] if isinstance(prompt, str) else outputs


def stream(
    model: Model,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: str = "static",
    overflow: str | Reencode = "error",
) -> Iterator[Piece]:
    """Continues a prompt and gives each piece of text as soon as it is there; arguments and errors as `generate`.

    The text of all pieces, put together, is the text of `generate` with the same arguments.
    """
    watch = Stopwatch()
    sampler = make_sampler(temperature, top_k, top_p)
    _, request = _request(model, [prompt], max_new_tokens, sampler, seed, cache, overflow)
    states = stream_states(model.params, model.config, request)
    return _pieces(model, states, max_new_tokens, watch, prepare_seconds=watch.lap())


def make_sampler(temperature: float, top_k: int | None = None, top_p: float | None = None) -> Sampler:
    """`Greedy` for temperature 0, else `Sampling`.

    Raises:
        SamplerError: a setting is out of range, be it used or not.
    """
    sampling = Sampling.create(1.0 if temperature == 0 else temperature, top_k, top_p)
    return Greedy() if temperature == 0 else sampling


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer, or a ModelError."""
    if model.tokenizer is None:
        raise ModelError(f"model {model.name}: expected a tokenizer, got none; use generate_tokens with token ids")
    return model.tokenizer


def _prompts(prompt: str | list[str]) -> list[str]:
    """One prompt or several as a list."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list | tuple) or not prompt:
        got = "none" if isinstance(prompt, list | tuple) else type(prompt).__name__
        raise TokenError(f"prompt: expected a text or a list of texts, got {got}")
    return list(prompt)


def _key(seed: int) -> jax.Array:
    if not isinstance(seed, int | np.integer):
        raise SamplerError(f"seed: expected a whole number, got {seed!r}")
    return jax.random.key(int(seed) % 2**32)


def _request(
    model: Model,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Sampler,
    seed: int,
    cache: str,
    overflow: str | Reencode,
) -> tuple[list[list[int]], Request]:
    """The prompts' tokens and the request for them."""
    tokenizer = tokenizer_of(model)
    rows = [tokenizer.encode(text) for text in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise TokenError(f"prompt {i}: expected at least one token, got an empty text")
    tokens, lengths = padded(rows)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(_key(seed), jnp.arange(len(rows)))
    eos_id = model.config.eos_token_id
    needed = min(tokens.shape[1] + max(max_new_tokens, 1) - 1, model.config.n_positions)
    empty = fit_cache(model.config, cache, len(rows), needed)
    request = prepare(model.config, tokens, max_new_tokens, empty, lengths, sampler, keys, eos_id, overflow)
    return rows, request


def _count(model: Model, tokens: np.ndarray) -> int:
    """How many of a row's tokens count: all, or those up to the first end-of-text id."""
    ends = np.flatnonzero(tokens == model.config.eos_token_id)  # none where the model has no such id
    return int(ends[0]) + 1 if ends.size else len(tokens)


def _generation(model: Model, prompt_ids: list[int], generated: Generated, row: int, timings: Timings) -> Generation:
    count = _count(model, np.asarray(generated.tokens[row]))
    ids = generated.tokens[row][:count].tolist()
    stopped = ids[-1] == model.config.eos_token_id
    return Generation(
        text=tokenizer_of(model).decode(ids[:-1] if stopped else ids),
        token_ids=ids,
        finish_reason="stop" if stopped else "length",
        logprobs=generated.logprobs[row][:count].tolist(),
        prompt_ids=prompt_ids,
        timings=timings,
    )


def _pieces(
    model: Model, states: Generator[DecodeState, None, Any], limit: int, watch: Stopwatch, prepare_seconds: float
) -> Iterator[Piece]:
    decoder = tokenizer_of(model).stream()
    prefill_seconds, decode_seconds = prepare_seconds, 0.0
    watch.skip()  # what the caller did before asking for the first piece
    for count, state in enumerate(states, 1):
        token, logprob = int(state.token[0]), float(state.logprob[0])
        if count == 1:
            prefill_seconds += watch.lap()
        else:
            decode_seconds += watch.lap()
        stopped = token == model.config.eos_token_id
        reason: FinishReason | None = "stop" if stopped else "length" if count == limit else None
        text = "" if stopped else decoder.push(token)
        if reason:
            text += decoder.flush()
        yield Piece(text, token, logprob, reason, Timings(watch.compile, prefill_seconds, decode_seconds, count))
        watch.skip()  # what the caller did with the piece
