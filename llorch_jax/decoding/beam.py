"""Beam search and diverse beam search.

The rules are those of transformers' `generate`, which `tests/reference` was made with: 2 K candidates per step (more
for several end-of-text ids), of which those among the best K that end the text are kept aside with their score divided
by length ** length_penalty, and the best K others continue.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.placement import pinned, placed
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.branching import check_numbers, check_real, check_untraced, count_ids, feed, span
from llorch_jax.decoding.params import EosIds
from llorch_jax.decoding.request import Request, prepare
from llorch_jax.decoding.steps import first_logits
from llorch_jax.errors import CapacityError, SearchError
from llorch_jax.params import Params
from llorch_jax.sampling.masking import only_allowed
from llorch_jax.tracing import whole

_MOST_BEAMS = 4096  # rows of one batch per prompt; more is probably a mistake, and would run out of memory
_NEVER = -1e30  # a score that no text has
_MOST_PENALTY = 1e6  # of diversity, and the largest power of a length: scores stay well above `_NEVER`
_MOST_POWER = 1e12


@dataclasses.dataclass(frozen=True)
class Beams:
    """The best continuations that a search found for each prompt, best first.

    Attributes:
        tokens: int32 [B, R, N], filled up with the row's (first) end-of-text id, or 0, after its end.
        lengths: int32 [B, R], tokens of each continuation, its end-of-text id included.
        scores: float32 [B, R], sum of the log-probabilities (in diverse search: less the penalties) over
            length ** length_penalty.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray


@struct.dataclass
class _Rules:
    """Settings, all traced.

    Attributes:
        length_penalty: float32 [].
        diversity: float32 [].
        eager: bool [], stop when K texts have ended.
        patient: bool [], stop only once no text, however long, could be better.
        eos_ids: int32 [B, E], filled up with -1.
        limit: int32 [], maximum number of new tokens.
        allowed: int32 [1, ceil(V / 32)], bits of the ids that may be chosen; None for all.
    """

    length_penalty: jax.Array
    diversity: jax.Array
    eager: jax.Array
    patient: jax.Array
    eos_ids: jax.Array
    limit: jax.Array
    allowed: jax.Array | None = None


@struct.dataclass
class _Group:
    """The beams of one group of every row.

    Attributes:
        tokens: int32 [B, K, N], of the beams that continue.
        scores: float32 [B, K], sums.
        ended: int32 [B, K, N], the best texts that have ended.
        ended_scores: float32 [B, K], divided by the length's power, best first; `_NEVER` if there is none.
        ended_lengths: int32 [B, K].
        open: bool [B], whether what has ended may still change.
    """

    tokens: jax.Array
    scores: jax.Array
    ended: jax.Array
    ended_scores: jax.Array
    ended_lengths: jax.Array
    open: jax.Array


@struct.dataclass
class _State:
    """The groups, the number of tokens of their beams (int32 []), and the cache of B * G * K rows, one token behind."""

    groups: tuple[_Group, ...]
    count: jax.Array
    cache: Any


def beam_search(
    params: Params,
    config: GPT2Config,
    prompt_tokens: Any,
    max_new_tokens: int = 32,
    *,
    num_beams: int = 4,
    num_return: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.5,
    eos_id: EosIds = "config",
    cache: KVCache | None = None,
    lengths: Any = None,
    allowed: Any = None,
) -> Beams:
    """The most likely continuations that beam search finds for a batch of prompts. Not inside your own `jit`.

    With several groups it is diverse beam search (Vijayakumar et al. 2016, 1610.02424, section 4): in every step the
    groups choose one after the other, and a token costs `diversity_penalty` for each beam of an earlier group that has
    just chosen it (Hamming diversity).

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        prompt_tokens: int32 [B, T]; rows shorter than T are padded on the right with any id.
        max_new_tokens: maximum number of new tokens of each continuation, 1 or more.
        num_beams: beams per prompt, all groups together; a multiple of num_beam_groups.
        num_return: number of continuations R to return, at most num_beams.
        length_penalty: power of the length that a finished text's log-probability is divided by; 0 for plain sums,
            above 0 in favour of longer texts.
        early_stopping: True stops as soon as there are num_beams finished texts; False when the best beam could not
            improve on them if it ended now; "never" when no beam could, however long it becomes.
        num_beam_groups: groups of beams.
        diversity_penalty: penalty in nats, 0 or more.
        eos_id: as in `generate_tokens`.
        cache: of B rows, to append the prompts to, donated; None makes a `StaticCache`. Its rows are forked after the
            prefill. A `PagedCache` needs pages for all beams, and a step on the host for every token.
        lengths: int32 [B], number of real prompt tokens in each row; None means all T.
        allowed: bits int32 [1, ceil(V / 32)], the lowest first, of the ids that may be chosen; None for all.

    Returns:
        The best `num_return` continuations of each prompt.

    Raises:
        TokenError, CapacityError: as `generate_tokens`.
        SearchError: a setting is invalid.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    whole("max_new_tokens", max_new_tokens, CapacityError)
    check_beams(num_beams, num_return, num_beam_groups, length_penalty, diversity_penalty, early_stopping)
    check_power(length_penalty, max_new_tokens)
    whole("num_beams", num_beams, SearchError, most=num_beam_groups * count_ids(config, allowed))  # first tokens differ
    request = prepare(config, prompt_tokens, max_new_tokens, cache, lengths, eos_id=eos_id, mesh=params.mesh)
    check_untraced(request)
    rules = _Rules(
        jnp.float32(length_penalty),
        jnp.float32(diversity_penalty),
        jnp.asarray(early_stopping is True),
        jnp.asarray(early_stopping == "never"),
        request.decoding.eos_ids,
        jnp.int32(max_new_tokens),
        None if allowed is None else jax.device_put(np.asarray(allowed, np.int32)),
    )
    logits, cache = first_logits(params, config, request)
    state = _start(request, num_beams, num_beam_groups, placed(params.mesh, cache.fork(num_beams)))
    state = _first(rules, state, jnp.repeat(logits, num_beams, axis=0), params.mesh)
    check_numbers(state.groups[0].scores)
    while int(state.count) < max_new_tokens and any(np.any(group.open) for group in state.groups):
        state = dataclasses.replace(state, cache=placed(params.mesh, state.cache.reserve(1)))
        until = min(max_new_tokens, int(state.count) + span(state.cache))
        state = _loop(params, config, rules, state, jnp.int32(until))
        check_numbers(state.groups[0].scores)
    return _best(request, state, num_return)


def check_beams(
    num_beams: Any,
    num_return: Any,
    num_beam_groups: Any,
    length_penalty: Any,
    diversity_penalty: Any,
    early_stopping: Any,
) -> None:
    """Raises SearchError for an invalid setting of `beam_search`."""
    whole("num_beams", num_beams, SearchError, most=_MOST_BEAMS)
    whole("num_return", num_return, SearchError)
    whole("num_beam_groups", num_beam_groups, SearchError)
    if num_return > num_beams:
        raise SearchError(f"num_return: expected at most num_beams={num_beams}, got {num_return}")
    if num_beams % num_beam_groups:
        raise SearchError(f"num_beam_groups: expected a divisor of num_beams={num_beams}, got {num_beam_groups}")
    check_real("length_penalty", length_penalty)
    check_real("diversity_penalty", diversity_penalty, least=0.0, most=_MOST_PENALTY)
    if not isinstance(early_stopping, bool | str) or early_stopping not in (True, False, "never"):
        raise SearchError(f"early_stopping: expected True, False or 'never', got {early_stopping!r:.80}")


def check_power(length_penalty: float, max_new_tokens: int) -> None:
    """Raises SearchError for a length penalty by which scores would leave the range of float32."""
    most = math.log(_MOST_POWER) / max(math.log(max_new_tokens), 1e-9)
    if abs(length_penalty) > most:
        raise SearchError(
            f"length_penalty: expected a number from -{most:.2g} to {most:.2g} with {max_new_tokens} new tokens, "
            f"got {length_penalty!r:.40}"
        )


def _start(request: Request, num_beams: int, num_beam_groups: int, cache: KVCache) -> _State:
    """The state before the first token: all beams are the prompt, and only the first of each group counts."""
    batch, beams, size = request.tokens.shape[0], num_beams // num_beam_groups, bucket(request.max_new_tokens)

    def group() -> _Group:
        return _Group(
            tokens=jnp.zeros((batch, beams, size), jnp.int32),
            scores=jnp.full((batch, beams), _NEVER).at[:, 0].set(0.0),
            ended=jnp.zeros((batch, beams, size), jnp.int32),
            ended_scores=jnp.full((batch, beams), _NEVER),
            ended_lengths=jnp.zeros((batch, beams), jnp.int32),
            open=jnp.ones(batch, bool),
        )

    return _State(tuple(group() for _ in range(num_beam_groups)), jnp.int32(0), cache)


@partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def _first(rules: _Rules, state: _State, logits: jax.Array, mesh: Mesh | None) -> _State:
    return pinned(mesh, _choose(rules, state, logits, state.cache))


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _loop(params: Params, config: GPT2Config, rules: _Rules, state: _State, until: jax.Array) -> _State:
    """Runs steps until the beams have `until` tokens, or until no finished text can change any more."""

    def unfinished(state: _State) -> jax.Array:
        return (state.count < until) & jnp.any(jnp.stack([group.open for group in state.groups]))

    def step(state: _State) -> _State:
        tokens = jnp.stack([group.tokens for group in state.groups], axis=1)
        last = jax.lax.dynamic_index_in_dim(tokens, state.count - 1, axis=3, keepdims=False)
        logits, _, cache = feed(params, config, last.reshape(-1), state.cache)
        return _choose(rules, state, logits, cache)

    return pinned(params.mesh, jax.lax.while_loop(unfinished, step, state))


def _choose(rules: _Rules, state: _State, logits: jax.Array, cache: KVCache) -> _State:
    """The state with one more token per beam, from logits [B * G * K, V] and a cache with all tokens so far."""
    batch, beams, _ = state.groups[0].tokens.shape
    count, vocab = len(state.groups), logits.shape[1]
    logprobs = only_allowed(jax.nn.log_softmax(logits), rules.allowed).reshape(batch, count, beams, vocab)
    chosen_before = jnp.zeros((batch, vocab))
    groups, rows = [], []
    for number, group in enumerate(state.groups):
        penalised = logprobs[:, number] - rules.diversity * chosen_before[:, None]
        after, parents, chosen = _extend(rules, group, penalised, state.count)
        chosen_before += jnp.where(group.open[:, None], chosen, 0.0)
        groups.append(after)
        rows.append((jnp.arange(batch, dtype=jnp.int32)[:, None] * count + number) * beams + parents)
    return _State(tuple(groups), state.count + 1, cache.select(jnp.stack(rows, axis=1).reshape(-1)))


def _extend(rules: _Rules, group: _Group, logprobs: jax.Array, count: jax.Array) -> tuple[_Group, jax.Array, jax.Array]:
    """One step of one group.

    Args:
        rules: the settings.
        group: its beams, of `count` tokens.
        logprobs: float32 [B, K, V] of the next token.
        count: int32 [].

    Returns:
        The group with one more token per beam; each beam's parent, int32 [B, K]; and how many beams, those that have
        just ended included, have chosen each token, float32 [B, V].
    """
    batch, beams, vocab = logprobs.shape
    width = min(max(2, 1 + rules.eos_ids.shape[1]) * beams, beams * vocab)
    totals, flat = jax.lax.top_k((group.scores[..., None] + logprobs).reshape(batch, -1), width)
    parents, tokens = flat // vocab, flat % vocab
    texts = jnp.take_along_axis(group.tokens, parents[..., None], axis=1)  # [B, C, N]
    texts = jax.lax.dynamic_update_slice_in_dim(texts, tokens[..., None], count, axis=2)
    is_end = jnp.any(tokens[..., None] == rules.eos_ids[:, None], axis=-1)
    scores, best = jax.lax.top_k(jnp.where(is_end, totals + _NEVER, totals), beams)
    among_best = jnp.arange(width)[None] < beams
    row = jnp.arange(batch)[:, None]
    choosing = (is_end & among_best).astype(jnp.float32).at[row, best].set(1.0)
    chosen = jnp.zeros((batch, vocab)).at[row, tokens].add(choosing)
    group = _with_ended(rules, group, texts, totals, (is_end | (count + 1 == rules.limit)) & among_best, count + 1)
    group = dataclasses.replace(group, scores=scores, tokens=jnp.take_along_axis(texts, best[..., None], axis=1))
    group = dataclasses.replace(group, open=_can_improve(rules, group, count + 1))
    return group, jnp.take_along_axis(parents, best, axis=1), chosen


def _with_ended(
    rules: _Rules, group: _Group, texts: jax.Array, totals: jax.Array, ends: jax.Array, count: jax.Array
) -> _Group:
    """The group with those candidates [B, C] among its finished texts that end here and are good enough."""
    beams = group.scores.shape[1]
    scores = jnp.where(ends & group.open[:, None], totals / _power(count, rules), _NEVER)
    merged, best = jax.lax.top_k(jnp.concatenate([group.ended_scores, scores], axis=1), beams)
    lengths = jnp.concatenate([group.ended_lengths, jnp.broadcast_to(count, totals.shape)], axis=1)
    return dataclasses.replace(
        group,
        ended=jnp.take_along_axis(jnp.concatenate([group.ended, texts], axis=1), best[..., None], axis=1),
        ended_scores=merged,
        ended_lengths=jnp.take_along_axis(lengths, best, axis=1),
    )


def _can_improve(rules: _Rules, group: _Group, count: jax.Array) -> jax.Array:
    """bool [B], whether beams of `count` tokens may still lead to a text better than the worst that has ended."""
    full = jnp.all(group.ended_scores > _NEVER / 2, axis=1)
    length = jnp.where(rules.patient & (rules.length_penalty > 0), rules.limit, count)
    possible = group.scores[:, 0] / _power(length, rules) > jnp.min(group.ended_scores, axis=1)
    return group.open & (~full | (possible & ~rules.eager))


def _power(length: jax.Array, rules: _Rules) -> jax.Array:
    return length.astype(jnp.float32) ** rules.length_penalty


def _best(request: Request, state: _State, num_return: int) -> Beams:
    """The best finished texts of all groups."""
    groups = jax.device_get(state.groups)
    tokens, lengths, scores = (
        np.concatenate([getattr(group, name) for group in groups], axis=1)
        for name in ("ended", "ended_lengths", "ended_scores")
    )
    best = np.argsort(-scores, axis=1, kind="stable")[:, :num_return]
    tokens = np.take_along_axis(tokens, best[..., None], axis=1)[..., : request.max_new_tokens]
    lengths, scores = (np.take_along_axis(x, best, axis=1) for x in (lengths, scores))
    filler = request.decoding.filler_on_host()[:, None, None]
    there = np.arange(request.max_new_tokens) < lengths[..., None]
    return Beams(np.where(there, tokens, filler).astype(np.int32), lengths, scores)
