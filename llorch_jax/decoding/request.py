"""A generation request: checked on the host, padded to buckets, in the form that the compiled functions take."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.placement import new_cache, placed
from llorch_jax.cache.static import StaticCache
from llorch_jax.checks import check_append, check_lengths, check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.overflow import Reencode, check_overflow, context_of, padded, shortened
from llorch_jax.decoding.params import DecodingParams, EosIds, decoding_params
from llorch_jax.errors import CapacityError
from llorch_jax.sampling import History, Sampler
from llorch_jax.tracing import is_concrete, whole

_NEXT_PART = np.int32(2**31 - 1)  # no position: what keys are folded with after a re-encoding
_MOST_TOKENS = 2**30  # sums of two such numbers fit int32
_MOST_HISTORY = 2**28  # tokens in a `History`, 1 GiB


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked generation request: what `generate_tokens` takes, in the form that the compiled functions take.

    Attributes:
        tokens: int32 [B, T], padded to a bucket.
        lengths: int32 [B].
        cache: with room reserved for the prompt; it will be donated.
        decoding: how tokens are chosen and rows end.
        max_new_tokens: number of steps before the context is full.
        remaining: int32 [B], the maximum number of new tokens of each row, after re-encodings too.
        finished: bool [B], rows that an end-of-text id has ended already.
        reencode: what is kept when the context is full; None where it cannot overflow.
        history: `History` of the prompt with room for all new tokens; None if the sampler does not use it.
        sampler_state: of the sampler before the first token.
        mesh: of the parameters.
    """

    tokens: Any
    lengths: Any
    cache: KVCache
    decoding: DecodingParams
    max_new_tokens: int
    remaining: np.ndarray
    finished: np.ndarray
    reencode: Reencode | None = None
    history: History | None = None
    sampler_state: Any = None
    mesh: Mesh | None = None

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.tokens.shape[0]

    @property
    def later(self) -> int:
        """Number of steps left for after a re-encoding."""
        return int(np.max(self.remaining)) - self.max_new_tokens


def prepare(
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int | Sequence[int],
    cache: KVCache | None = None,
    lengths: Any = None,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    eos_id: EosIds = "config",
    overflow: str | Reencode = "error",
    *,
    top_logprobs: int = 0,
    room: int | None = None,
    mesh: Mesh | None = None,
) -> Request:
    """Checks the arguments of `generate_tokens` on the host; see there.

    `top_logprobs` alternatives are recorded at every step; the history has room for `room` tokens where that is more.
    `mesh` is that of the parameters.
    """
    tokens = check_tokens(config, prompt_tokens)
    batch = tokens.shape[0]
    lengths = check_lengths(lengths, tokens)
    remaining = new_token_counts(max_new_tokens, batch)
    decoding = decoding_params(config, batch, sampler, key, eos_id, top_logprobs)
    now = int(np.max(remaining))
    reencode = check_overflow(overflow)
    if reencode is not None:
        if not is_concrete(tokens, lengths, cache):
            raise CapacityError("overflow: expected 'error' inside jit, where nothing can be encoded anew")
        context = context_of(config, cache)
        tokens, lengths = shortened(reencode, tokens, lengths, context)
        now = _steps_until_full(context, lengths, remaining)
        if (
            now < np.max(remaining) and cache is not None
        ):  # pages for rows that fill the context, as they will in the end
            cache.check_room(context)
    capacity = _history_capacity(decoding.sampler, tokens.shape, int(np.max(remaining)), room)
    tokens, cache = check_append(config, tokens, cache, lengths, later=np.minimum(remaining, now) - 1)
    if cache is None:
        slots = bucket(tokens.shape[1] + now - 1, config.n_positions)
        cache = new_cache(mesh, StaticCache.init, config, batch_size=batch, capacity=slots)
    padded_tokens = pad_to_bucket(tokens, config)
    return Request(
        padded_tokens,
        lengths,
        placed(mesh, cache),
        placed(mesh, decoding),
        now,
        remaining,
        finished=np.zeros(batch, bool),
        reencode=reencode,
        history=placed(mesh, History.of(padded_tokens, lengths, capacity)) if capacity else None,
        sampler_state=placed(mesh, decoding.sampler.init(batch)),
        mesh=mesh,
    )


def new_token_counts(max_new_tokens: Any, batch: int) -> np.ndarray:
    """The maximum number of new tokens of each row, int32 [B], from one number or one per row.

    Raises:
        CapacityError: they are not whole numbers from 1 up, or not as many as rows.
    """
    if isinstance(max_new_tokens, jax.Array | np.ndarray):
        max_new_tokens = np.asarray(max_new_tokens).tolist()
    given = max_new_tokens if isinstance(max_new_tokens, list | tuple) else [max_new_tokens] * batch
    if len(given) != batch:
        raise CapacityError(f"max_new_tokens: expected one number or {batch}, one per row, got {len(given)}")
    counts = [whole("max_new_tokens", each, CapacityError, most=_MOST_TOKENS) for each in given]
    return np.array(counts, np.int32)


def _steps_until_full(context: int, lengths: Any, remaining: np.ndarray) -> int:
    """The number of steps after which a row that is to have more tokens has filled the context."""
    possible = context + 1 - np.asarray(lengths)
    return int(min(np.max(remaining), *np.where(remaining > possible, possible, np.max(remaining))))


def _history_capacity(sampler: Sampler, shape: tuple[int, ...], new: int, room: int | None) -> int:
    """Number of tokens per row for which a history must have room; 0 if the sampler does not use it."""
    if not sampler.needs_history:
        return 0
    batch, columns = shape
    capacity = bucket(max(columns + new, room or 0))
    if batch * capacity > _MOST_HISTORY:
        most = _MOST_HISTORY // (2 * batch) - columns
        raise CapacityError(
            f"max_new_tokens: expected at most {most} with a sampler that looks at the text so far, got {new}"
        )
    return capacity


def following(config: GPT2Config, request: Request, new: np.ndarray, state: Any) -> Request:
    """The request that continues one that has filled the context.

    Args:
        config: the model's hyperparameters.
        request: the one before, with `later` above 0.
        new: its new tokens, int32 [B, N].
        state: the last state of decoding; its cache is cleared and reused.
    """
    assert request.reencode is not None
    cache = state.cache
    context = cache.capacity
    remaining = np.array(state.remaining)
    finished = np.array(state.finished)
    going = ~finished & (remaining > 0)
    rows = _grown_rows(request, new, remaining, going)
    # The others continue as they would alone; a row that has ended stays as it is and needs no room.
    cut = np.array([len(row) > context for row in rows])
    kept, counts = padded(
        [request.reencode.kept(row, context) if long else row for row, long in zip(rows, cut, strict=True)]
    )
    # Positions start again, and a key is folded with the position: other keys for the next part of the text.
    folded = jax.vmap(jax.random.fold_in, (0, None))(request.decoding.keys, _NEXT_PART)
    keys = jnp.where(jnp.asarray(cut), folded, request.decoding.keys)
    now = _steps_until_full(context, counts[going], remaining[going])
    later = np.where(going, np.minimum(remaining, now) - 1, 0)
    kept, cache = check_append(config, kept, cache.clear(), counts, later=later)
    return dataclasses.replace(
        request,
        tokens=pad_to_bucket(kept, config),
        lengths=counts,
        cache=cache,
        decoding=dataclasses.replace(request.decoding, keys=keys),
        max_new_tokens=now,
        remaining=np.where(going, remaining, 0),
        finished=finished,
        history=state.history,
        sampler_state=state.sampler_state,
    )


def _grown_rows(request: Request, new: np.ndarray, remaining: np.ndarray, going: np.ndarray) -> list[np.ndarray]:
    """Each row's tokens with the new ones int32 [B, N]; of rows that are done without the last, as in the cache."""
    rows = []
    got = request.remaining - remaining
    added = np.where(going, got, np.maximum(got - 1, 0))
    for row, count, more, tokens in zip(request.tokens, request.lengths, added, new, strict=True):
        rows.append(np.concatenate([row[:count], tokens[:more]]))
    return rows


def pad_to_bucket(tokens: Any, config: GPT2Config) -> Any:
    """Tokens [B, T] padded on the right so that T is the size of a bucket; single tokens stay as they are.

    Tokens that are known stay NumPy's: `jnp.pad` would be compiled for every length.
    """
    count = tokens.shape[1]
    size = 1 if count == 1 else bucket(count, config.n_positions)
    padding = ((0, 0), (0, size - count))
    return np.pad(np.asarray(tokens), padding) if is_concrete(tokens) else jnp.pad(tokens, padding)
