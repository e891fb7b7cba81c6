"""Text in, text out: generate and stream."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any, overload

import jax
import numpy as np

from llorch_jax.decoding.loop import generate_from
from llorch_jax.decoding.overflow import Reencode
from llorch_jax.decoding.request import Request
from llorch_jax.decoding.steps import Generated, first_logits
from llorch_jax.decoding.streaming import Step, stream_steps
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import make_sampler
from llorch_jax.text.constrained.constraint import take_constraint
from llorch_jax.text.results import (
    Ending,
    FinishReason,
    Generation,
    Piece,
    advance,
    ending_of,
    generation_of,
    id_logprobs,
    on_host,
    prompt_list,
    text_request,
    tokenizer_of,
)
from llorch_jax.text.stopping import StopMatcher
from llorch_jax.text.timing import Stopwatch, Timings


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
        from llorch_jax.text.constrained.decoding import generate_constrained

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
    prompts, ending = prompt_list(prompt), ending_of(model, stop, stop_ids)
    sampler = make_sampler(temperature, **settings)
    rows, request = text_request(model, prompts, max_new_tokens, sampler, seed, cache, overflow, ending, top_logprobs)
    if ending.stops:
        prefill_seconds, generated = _until_stopped(model, request, ending, watch)
    else:
        logits, cache_after = first_logits(model.params, model.config, request)
        jax.block_until_ready(logits)
        prefill_seconds = watch.lap()
        generated = jax.device_get(generate_from(model.params, model.config, request, logits, cache_after)[0])
    decode_seconds = watch.lap()
    outputs = [generation_of(model, row, generated, i, ending) for i, row in enumerate(rows)]
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
        from llorch_jax.text.constrained.decoding import stream_constrained

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
    ending = ending_of(model, stop, stop_ids)
    sampler = make_sampler(temperature, **settings)
    _, request = text_request(model, [prompt], max_new_tokens, sampler, seed, cache, overflow, ending, top_logprobs)
    steps = stream_steps(model.params, model.config, request)
    return _pieces(model, steps, max_new_tokens, ending, watch, prepare_seconds=watch.lap())


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


def _pieces(
    model: Model, steps: Iterator[Step], limit: int, ending: Ending, watch: Stopwatch, prepare_seconds: float
) -> Generator[Piece, None, None]:
    decoder, matcher = tokenizer_of(model).stream(), StopMatcher(ending.stops)
    prefill_seconds, decode_seconds = prepare_seconds, 0.0
    watch.skip()  # what the caller did before asking for the first piece
    for count, step in enumerate(steps, 1):
        token, logprob = int(step.token[0]), float(step.logprob[0])
        top = None if step.top is None else id_logprobs(*(array[0] for array in on_host(step.top)))
        if count == 1:
            prefill_seconds += watch.lap()
        else:
            decode_seconds += watch.lap()
        text, stopped = advance(decoder, matcher, ending, token)
        if count == limit and stopped is None:
            text += matcher.push(decoder.flush()) + matcher.flush()
            stopped = matcher.found
        reason: FinishReason | None = "stop" if stopped is not None else "length" if count == limit else None
        timings = Timings(watch.compile, prefill_seconds, decode_seconds, count)
        yield Piece(text, token, logprob, reason, timings, stopped, top)
        if reason:
            return
        watch.skip()  # what the caller did with the piece
