"""Prefill, decode step and generation loops: token arrays in, token arrays out, all compiled.

Everything here owns the cache that it is given: the cache is donated to XLA, which writes the next one into the same
buffers, and must not be used again. `forward` is the variant that leaves its cache valid.

The loop inside `generate_tokens` and that of `stream_tokens` run the same step, from `steps`.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.placement import placed
from llorch_jax.checks import check_append, check_lengths, check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.decoding import steps
from llorch_jax.decoding.overflow import Reencode
from llorch_jax.decoding.params import DecodingParams, EosIds
from llorch_jax.decoding.request import Request, following, pad_to_bucket, prepare
from llorch_jax.decoding.streaming import Step, stream_steps
from llorch_jax.errors import TokenError
from llorch_jax.params import Params
from llorch_jax.sampling import Sampler
from llorch_jax.tracing import is_concrete

Cache = TypeVar("Cache", bound=KVCache)


def prefill(
    params: Params, config: GPT2Config, tokens: Any, cache: Cache, lengths: Any = None
) -> tuple[jax.Array, Cache]:
    """Appends prompts to a cache. The cache given is donated: use the returned one.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        tokens: int32 [B, T]; rows shorter than T are padded on the right with any id.
        cache: empty, or holding earlier tokens that these follow.
        lengths: int32 [B], how many tokens of each row are real; None means all T.

    Returns:
        Logits float32 [B, V] of each row's last token, and the cache.

    Raises:
        TokenError: tokens or lengths are empty, misshapen, not integers, or out of range.
        CapacityError: a prompt does not fit the context or the cache; the cache is untouched then.
    """
    tokens = check_tokens(config, tokens)
    lengths = check_lengths(lengths, tokens)
    tokens, cache = check_append(config, tokens, cache, lengths)
    cache = placed(params.mesh, cache)
    return steps.prefill_step(params, config, pad_to_bucket(tokens, config), lengths, cache, fresh=cache.is_empty())


def decode_step(params: Params, config: GPT2Config, token: Any, cache: Cache) -> tuple[jax.Array, Cache]:
    """Appends one token per row to a cache. The cache given is donated: use the returned one.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        token: int32 [B].
        cache: of the tokens before.

    Returns:
        Logits float32 [B, V] of these tokens, and the cache.

    Raises:
        TokenError: the tokens are misshapen, not integers, or outside the vocabulary.
        CapacityError: a row of the cache is full; the cache is untouched then.
    """
    token = token if isinstance(token, jax.Array) else np.asarray(token)
    if token.ndim != 1:
        raise TokenError(f"token: expected one id per row, shape [B], got shape {list(token.shape)}")
    tokens, cache = check_append(config, token[:, None], cache)
    return steps.decode(params, config, tokens[:, 0], placed(params.mesh, cache))


def generate_tokens(
    params: Params,
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int | Sequence[int] = 32,
    cache: KVCache | None = None,
    lengths: Any = None,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    eos_id: EosIds = "config",
    overflow: str | Reencode = "error",
) -> tuple[jax.Array, KVCache]:
    """Continues a batch of prompts, in one compiled loop. Inside your own `jit`, values are not checked.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        prompt_tokens: int32 [B, T]; rows shorter than T are padded on the right with any id.
        max_new_tokens: maximum number of new tokens of each row, one number or a sequence of B, 1 or more.
        cache: to append to, donated; None makes a `StaticCache` of the size needed.
        lengths: int32 [B], number of real prompt tokens in each row; None means all T.
        sampler: a `Sampler`; `Greedy()` by default.
        key: one key for the batch, which is folded with each row's number, or one key per row [B]. The same key gives
            the same tokens, here and in `stream_tokens`.
        eos_id: id or ids that end a row, or a list of ids per row. By default those of the configuration; None or ()
            for none.
        overflow: what happens when a text outgrows the context. "error" raises before anything is computed;
            "reencode", or a `Reencode` with settings, keeps the first and newest tokens and encodes them anew, as often
            as needed, in the same memory.

    Returns:
        int32 [B, N], N the largest `max_new_tokens`, filled up with the row's (first) end-of-text id, or 0, after its
        end; and the cache, which holds the prompt and all new tokens of a row but its last (after a re-encoding: those
        kept and the later ones).

    Raises:
        TokenError, CapacityError: as `prefill`; the prompt and all new tokens but the last must fit.
        SamplerError: a random sampler got no key, or the settings ban every token.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    request = prepare(
        config, prompt_tokens, max_new_tokens, cache, lengths, sampler, key, eos_id, overflow, mesh=params.mesh
    )
    generated, cache_after = generate_from(params, config, request, steps.start(params, config, request))
    return generated.tokens, cache_after


def stream_tokens(
    params: Params,
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int | Sequence[int] = 32,
    cache: KVCache | None = None,
    lengths: Any = None,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    eos_id: EosIds = "config",
    overflow: str | Reencode = "error",
) -> Generator[np.ndarray, None, KVCache]:
    """The tokens of `generate_tokens`, one step at a time, as soon as each is there.

    Arguments and errors are those of `generate_tokens`; errors come at the call, before the first step.

    Yields:
        int32 [B]; the (first) end-of-text id, or 0, in rows that are done. Stops when all rows are.

    Returns:
        The cache, as the generator's return value.
    """
    request = prepare(
        config, prompt_tokens, max_new_tokens, cache, lengths, sampler, key, eos_id, overflow, mesh=params.mesh
    )
    return _tokens_of(stream_steps(params, config, request))


def compile_count() -> int:
    """How many variants of prefill, decode step and generation loop have been compiled in this process."""
    return steps.compile_count()


def generate_from(
    params: Params, config: GPT2Config, request: Request, state: steps.DecodeState
) -> tuple[steps.Generated, KVCache]:
    """Tokens and log-probabilities [B, N] of a prepared request after its first token, and the cache.

    N is the largest number of new tokens that was asked for.
    """
    parts, total = [], int(np.max(request.remaining))
    while True:
        part, state = _generate_segment(params, config, request, state)
        parts.append(part)
        if request.later == 0 or _all_done(request.decoding, state):
            break
        request = following(config, request, np.asarray(part.tokens), state)
        state = steps.start(params, config, request)
    missing = total - sum(part.tokens.shape[1] for part in parts)
    if missing:
        parts.append(steps.filler(request.decoding, missing))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, 1) if arrays[1:] else arrays[0], *parts), state.cache


def _generate_segment(
    params: Params, config: GPT2Config, request: Request, state: steps.DecodeState
) -> tuple[steps.Generated, steps.DecodeState]:
    """Generates until the context is full.

    The loop runs in spans as long as the cache has room; between them a cache that grows may do so.
    """
    decoding, limit = request.decoding, request.max_new_tokens
    out = steps.put(steps.filler(decoding, bucket(limit)), state, state.token, 0)
    if not is_concrete(state):  # inside a caller's own jit: the cache must have room from the start
        out, state = steps.loop(params, config, decoding, out, state, jnp.asarray([1, limit], jnp.int32))
        return jax.tree.map(lambda array: array[:, :limit], out), state
    return _run_spans(params, config, decoding, out, state, (1, limit))


def run_steps(
    params: Params, config: GPT2Config, decoding: DecodingParams, state: steps.DecodeState, counts: np.ndarray
) -> tuple[steps.Generated, steps.DecodeState]:
    """The next tokens after a state, as many per row as `counts` int32 [B] says, and the state then.

    The cache must have room for them. Returns tokens [B, N], N the largest count.
    """
    longest = int(np.max(counts))
    state = dataclasses.replace(state, remaining=jax.device_put(counts))
    out = steps.filler(decoding, bucket(longest))
    return _run_spans(params, config, decoding, out, state, (0, longest))


def _run_spans(
    params: Params,
    config: GPT2Config,
    decoding: DecodingParams,
    out: steps.Generated,
    state: steps.DecodeState,
    span: tuple[int, int],
) -> tuple[steps.Generated, steps.DecodeState]:
    """Fills the columns of a span of `out`, as long as rows are not done, and cuts it to the span's end."""
    done, end = span
    while done < end and not _all_done(decoding, state):
        state, room = steps.with_room(params, state)
        until = min(end, done + room)
        out, state = steps.loop(params, config, decoding, out, state, jnp.asarray([done, until], jnp.int32))
        done = until
    # By NumPy: a slice would be compiled for every length.
    new = jax.tree.map(lambda array: np.asarray(array)[:, :end], out)
    steps.check_chosen(new.tokens, new.logprobs)
    return jax.device_put(new), state


def _all_done(decoding: DecodingParams, state: steps.DecodeState) -> bool:
    return decoding.eos_ids.shape[1] > 0 and bool(np.all(steps.done_on_host(state)))


def _tokens_of(stream: Generator[Step, None, KVCache]) -> Generator[np.ndarray, None, KVCache]:
    while True:
        try:
            step = next(stream)
        except StopIteration as end:
            return end.value
        yield step.token
