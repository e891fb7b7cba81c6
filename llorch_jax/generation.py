"""Text in, text out: generate and stream."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.memory import fit_cache
from llorch_jax.checkpoint import Model
from llorch_jax.constraints import take_constraint
from llorch_jax.decoding import generate_from
from llorch_jax.errors import LlorchError, TokenError
from llorch_jax.overflow import Reencode, padded
from llorch_jax.request import Request, prepare
from llorch_jax.sampling import Sampler, SamplerError, make_sampler
from llorch_jax.steps import Alternatives, Generated, first_logits
from llorch_jax.stopping import StopMatcher, check_stops
from llorch_jax.streaming import Step, stream_steps
from llorch_jax.timing import Stopwatch, Timings
from llorch_jax.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]
TopLogprobs = list[tuple[int, float]]


class ModelError(LlorchError):
    """A model lacks what a call needs, such as a tokenizer."""


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


@overload
def generate(model: Model, prompt: str, max_new_tokens: int = ..., **settings: Any) -> Generation: ...
@overload
def generate(model: Model, prompt: list[str], max_new_tokens: int = ..., **settings: Any) -> list[Generation]: ...
def generate(
    model: Model,
    prompt: str | list[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    cache: str = "static",
    overflow: str | Reencode = "error",
    stop: str | Sequence[str] | None = None,
    stop_ids: Sequence[int] = (),
    top_logprobs: int = 0,
    **settings: Any,
) -> Generation | list[Generation]:
    """Continues a prompt, or a batch of prompts.

    Args:
        model: from `load`.
        prompt: a text, or several, which then run as one batch.
        max_new_tokens: how many tokens each gets at most.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        seed: of the draws; the same seed gives the same text. Of larger numbers the lowest 32 bits count. One per
            prompt gives each what it would get alone.
        cache: layout of the KV cache, such as static, dynamic, rotating:WINDOW[+SINKS], paged, int8 or h2o:BUDGET.
        overflow: "error" refuses texts that would outgrow the context; "reencode" (or a `Reencode`) goes on with the
            first and newest tokens, as `generate_tokens` does.
        stop: a text, or several, before which the new text ends.
        stop_ids: ids that end a text, beside the model's own.
        top_logprobs: how many of the most likely tokens to report at every step.
        settings: top_k, top_p and the others of `Sampling.create`, or mirostat_tau and mirostat_eta. Also one of regex,
            json_schema, grammar and choices, what a `Constraint` is made of: the text matches it in full unless its
            finish_reason is "length". Or constraint: a `Constraint`, or a list with one or None for each prompt.

    Returns:
        A `Generation`, or a list of them where `prompt` is a list.

    Raises:
        ModelError: the model has no tokenizer.
        TokenError: a prompt is empty or holds what the tokenizer has no token for.
        CapacityError: a prompt and its new tokens do not fit the model's context.
        SamplerError: a setting is unknown or out of range.
        ConstraintError: a constraint is invalid, or llguidance (`pip install 'llorch-jax[constrained]'`) is missing.
    """
    constraint = take_constraint(settings)
    if constraint is not None:
        from llorch_jax.constrained import generate_constrained

        common: dict[str, Any] = {
            "temperature": temperature,
            "seed": seed,
            "cache": cache,
            "overflow": overflow,
            "stop": stop,
        }
        common |= {"stop_ids": stop_ids, "top_logprobs": top_logprobs}
        return generate_constrained(model, prompt, max_new_tokens, constraint, **common, **settings)
    watch = Stopwatch()
    prompts, ending = _prompts(prompt), _ending(model, stop, stop_ids)
    sampler = make_sampler(temperature, **settings)
    rows, request = _request(model, prompts, max_new_tokens, sampler, seed, cache, overflow, ending, top_logprobs)
    if ending.stops:
        prefill_seconds, generated = _until_stopped(model, request, ending, watch)
    else:
        logits, cache_after = first_logits(model.params, model.config, request)
        jax.block_until_ready(logits)
        prefill_seconds = watch.lap()
        generated = jax.device_get(generate_from(model.params, model.config, request, logits, cache_after)[0])
    decode_seconds = watch.lap()
    outputs = [_generation(model, row, generated, i, ending) for i, row in enumerate(rows)]
    count = max(len(out.token_ids) for out in outputs)
    timings = Timings(watch.compile, prefill_seconds, decode_seconds, count)
    outputs = [dataclasses.replace(out, timings=timings) for out in outputs]
    return outputs[0] if isinstance(prompt, str) else outputs


def stream(
    model: Model,
    prompt: str,
    max_new_tokens: int = 64,
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
    """Continues a prompt and gives each piece of text as soon as it is there; arguments and errors as `generate`.

    The text of all pieces, put together, is the text of `generate` with the same arguments.
    """
    constraint = take_constraint(settings)
    if constraint is not None:
        from llorch_jax.constrained import stream_constrained

        common: dict[str, Any] = {
            "temperature": temperature,
            "seed": seed,
            "cache": cache,
            "overflow": overflow,
            "stop": stop,
        }
        common |= {"stop_ids": stop_ids, "top_logprobs": top_logprobs}
        return stream_constrained(model, prompt, max_new_tokens, constraint, **common, **settings)
    watch = Stopwatch()
    ending = _ending(model, stop, stop_ids)
    sampler = make_sampler(temperature, **settings)
    _, request = _request(model, [prompt], max_new_tokens, sampler, seed, cache, overflow, ending, top_logprobs)
    steps = stream_steps(model.params, model.config, request)
    return _pieces(model, steps, max_new_tokens, ending, watch, prepare_seconds=watch.lap())


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


def _ending(model: Model, stop: str | Sequence[str] | None, stop_ids: Sequence[int]) -> Ending:
    own = () if model.config.eos_token_id is None else (model.config.eos_token_id,)
    return Ending(tuple(dict.fromkeys((*own, *stop_ids))), check_stops(stop))


def _key(seed: int) -> jax.Array:
    if not isinstance(seed, int | np.integer):
        raise SamplerError(f"seed: expected a whole number, got {seed!r}")
    return jax.random.key(int(seed) % 2**32)


def _row_keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """A key per row: of one seed and the row's number, or of the row's own seed and number 0."""
    if isinstance(seed, int | np.integer) or not isinstance(seed, Sequence):
        return jax.vmap(jax.random.fold_in, (None, 0))(_key(seed), jnp.arange(count))
    if len(seed) != count:
        raise SamplerError(f"seed: expected one, or {count}, one per prompt, got {len(seed)}")
    return jax.vmap(jax.random.fold_in, (0, None))(jnp.stack([_key(each) for each in seed]), 0)


def _request(
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
    keys = _row_keys(seed, len(rows))
    needed = min(tokens.shape[1] + max(max_new_tokens, 1) - 1, config.n_positions)
    empty = fit_cache(config, cache, len(rows), needed)
    ids = ending.ids or None
    request = prepare(
        config, tokens, max_new_tokens, empty, lengths, sampler, keys, ids, overflow, top_logprobs=top_logprobs
    )
    return rows, request


def _until_stopped(model: Model, request: Request, ending: Ending, watch: Stopwatch) -> tuple[float, Generated]:
    """Step by step until every row has ended by an id or a stop string: seconds of the prefill, and what came."""
    batch = request.tokens.shape[0]
    decoders = [tokenizer_of(model).stream() for _ in range(batch)]
    matchers = [StopMatcher(ending.stops) for _ in range(batch)]
    parts: list[tuple] = []
    prefill_seconds = 0.0
    for step in stream_steps(model.params, model.config, request):
        parts.append((step.token, step.logprob, step.top))
        if len(parts) == 1:
            prefill_seconds = watch.lap()
        for token, decoder, matcher in zip(step.token.tolist(), decoders, matchers, strict=True):
            if matcher.found is None and token not in ending.ids:
                matcher.push(decoder.push(token))
        if all(matcher.found or done for matcher, done in zip(matchers, step.finished, strict=True)):
            break
    return prefill_seconds, Generated(*jax.tree.map(lambda *steps: np.stack(steps, axis=1), *parts))


def _generation(model: Model, prompt_ids: list[int], generated: Generated, row: int, ending: Ending) -> Generation:
    """What row `row` got; its timings are to be filled in."""
    decoder, matcher = tokenizer_of(model).stream(), StopMatcher(ending.stops)
    ids, text, reason = [], "", None
    for token in np.asarray(generated.tokens[row]).tolist():
        ids.append(token)
        new, reason = _advance(decoder, matcher, ending, token)
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
        else [_pairs(ids, logprobs) for ids, logprobs in zip(*_arrays(top), strict=True)],
    )


def _advance(decoder: StreamDecoder, matcher: StopMatcher, ending: Ending, token: int) -> tuple[str, int | str | None]:
    """The text that a token made certain, and the id or stop string by which it ended the text."""
    if token in ending.ids:
        text = matcher.push(decoder.flush())
        return text + matcher.flush(), token
    return matcher.push(decoder.push(token)), matcher.found


def _pieces(
    model: Model, steps: Iterator[Step], limit: int, ending: Ending, watch: Stopwatch, prepare_seconds: float
) -> Generator[Piece, None, None]:
    decoder, matcher = tokenizer_of(model).stream(), StopMatcher(ending.stops)
    prefill_seconds, decode_seconds = prepare_seconds, 0.0
    watch.skip()  # what the caller did before asking for the first piece
    for count, step in enumerate(steps, 1):
        token, logprob = int(step.token[0]), float(step.logprob[0])
        top = None if step.top is None else _pairs(*(array[0] for array in _arrays(step.top)))
        if count == 1:
            prefill_seconds += watch.lap()
        else:
            decode_seconds += watch.lap()
        text, stopped = _advance(decoder, matcher, ending, token)
        if count == limit and stopped is None:
            text += matcher.push(decoder.flush()) + matcher.flush()
            stopped = matcher.found
        reason: FinishReason | None = "stop" if stopped is not None else "length" if count == limit else None
        timings = Timings(watch.compile, prefill_seconds, decode_seconds, count)
        yield Piece(text, token, logprob, reason, timings, stopped, top)
        if reason:
            return
        watch.skip()  # what the caller did with the piece


def _arrays(top: Alternatives) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(top.ids), np.asarray(top.logprobs)


def _pairs(ids: np.ndarray, logprobs: np.ndarray) -> TopLogprobs:
    """Ids with their log-probabilities."""
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))
