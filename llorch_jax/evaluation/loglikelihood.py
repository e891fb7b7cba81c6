"""Log-likelihoods of several continuations of one text, which share the cache of that text."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.buckets import bucket, power_of_two
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.placement import new_cache
from llorch_jax.cache.static import StaticCache
from llorch_jax.checks import check_context, check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.loop import prefill
from llorch_jax.decoding.overflow import padded
from llorch_jax.decoding.scoring import check_finite
from llorch_jax.decoding.steps import logprobs_of
from llorch_jax.errors import TokenError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.sampling.masking import only_allowed
from llorch_jax.text.vocabulary import known_ids, tokenizer_of
from llorch_jax.tokenizer import Tokenizer

ROWS = 8  # continuations that are scored at once


@dataclasses.dataclass(frozen=True)
class Choice:
    """How likely a continuation is.

    Attributes:
        text: the continuation as given.
        token_ids: ids of its tokens.
        logprobs: natural log-probability of each, given the prefix and those before it.
        is_greedy: whether greedy decoding would write it.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        """Log-probability per token, which does not favour short continuations."""
        return self.total / len(self.logprobs)


def choices(model: Model, prefix: str, continuations: Sequence[str]) -> list[Choice]:
    """Log-likelihood of each of several continuations of a text. The text is encoded and prefilled only once.

    Tokens are found as the Language Model Evaluation Harness finds them: white space at the end of the prefix is moved
    to the continuation, both are encoded together, and the continuation's tokens are those after as many as the prefix
    alone has. After an empty prefix the model's begin-of-text (else end-of-text) token comes before the continuations.

    Args:
        model: from `load`.
        prefix: the text before.
        continuations: one or more; a space between words belongs to the continuation.

    Returns:
        One `Choice` for each, in order.

    Raises:
        ModelError: the model has no tokenizer.
        TokenError: there is no continuation, one has no token, or the prefix has none and the model no begin-of-text.
        CapacityError: prefix and continuation do not fit the context.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if not isinstance(continuations, list | tuple) or not continuations:
        raise TokenError(f"continuations: expected a list of at least one text, got {continuations!r:.80}")
    tokenizer = tokenizer_of(model)
    for name, text in (("prefix", prefix), *((f"continuations[{i}]", text) for i, text in enumerate(continuations))):
        if not isinstance(text, str):
            raise TokenError(f"{name}: expected a text, got {text!r:.80}")
    pairs = [encode_pair(tokenizer, prefix, text, first_token(model.config)) for text in continuations]
    for i, (_, ids) in enumerate(pairs):
        if not ids:
            raise TokenError(f"continuations[{i}]: expected at least one token, got {continuations[i]!r:.80}")
    allowed = known_ids(tokenizer, model.config.vocab_size)
    found = score_pairs(model.params, model.config, pairs, allowed=allowed)
    return [
        Choice(text, ids, logprobs.tolist(), greedy)
        for text, (_, ids), (logprobs, greedy) in zip(continuations, pairs, found, strict=True)
    ]


def first_token(config: GPT2Config) -> int | None:
    """What stands before a text that has nothing before it: begin-of-text, else end-of-text, else None."""
    return next(iter(config.eos_ids), None) if config.bos_token_id is None else config.bos_token_id


def encode_pair(tokenizer: Tokenizer, prefix: str, continuation: str, first: int | None) -> tuple[list[int], list[int]]:
    """Token ids of a prefix and of its continuation, by the rule that `choices` states.

    Raises:
        TokenError: the prefix has no tokens, and there is no token `first` to stand in its place.
    """
    kept = prefix.rstrip()
    continuation, prefix = prefix[len(kept) :] + continuation, kept
    before = tokenizer.encode(prefix)
    if before:
        return before, tokenizer.encode(prefix + continuation)[len(before) :]
    if first is None:
        raise TokenError("prefix: expected at least one token, as the model has no begin-of-text token, got none")
    return [first], tokenizer.encode(continuation)


def score_continuations(
    params: Params, config: GPT2Config, prefix: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray, bool]]:
    """`score_pairs` for several continuations of one prefix."""
    return score_pairs(params, config, [(prefix, ids) for ids in continuations])


def score_pairs(
    params: Params,
    config: GPT2Config,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = ROWS,
    allowed: np.ndarray | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[tuple[np.ndarray, bool]]:
    """Log-probabilities of the tokens of continuations, and whether each token is the most likely one.

    Each distinct prefix is prefilled once. Prefixes of similar length run as one batch, and so do continuations.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        pairs: token ids of a prefix and of its continuation, at least one of each; the last token of a continuation
            needs no position in the context.
        batch_size: maximum number of prefixes, and of continuations, that run at once.
        allowed: bits int32 [1, ceil(V / 32)], the lowest first, of the ids that may be the most likely; None for all.
        progress: called with the number of pairs that have just been scored.

    Returns:
        For each pair a float32 [T] and a bool.

    Raises:
        TokenError: ids are outside the vocabulary.
        CapacityError: a pair does not fit the context. In both cases nothing has run.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (prefix, continuation) in enumerate(pairs):
        check_tokens(config, [[*prefix, *continuation]])
        check_context(config, np.int32(len(prefix)), len(continuation) - 1)
        groups.setdefault(tuple(prefix), []).append(number)
    results: list[tuple[np.ndarray, bool]] = [(np.zeros(0, np.float32), True)] * len(pairs)
    prefixes = sorted(groups, key=len, reverse=True)
    for start in range(0, len(prefixes), batch_size):
        chunk = prefixes[start : start + batch_size]
        members = [number for prefix in chunk for number in groups[prefix]]
        rows = [row for row, prefix in enumerate(chunk) for _ in groups[prefix]]
        found = _score_chunk(params, config, chunk, rows, [pairs[i][1] for i in members], batch_size, allowed)
        for number, (logprobs, is_greedy) in zip(members, found, strict=True):
            check_finite(logprobs)
            results[number] = (logprobs, is_greedy)
        progress(len(members))
    return results


def _score_chunk(
    params: Params,
    config: GPT2Config,
    prefixes: Sequence[Sequence[int]],
    rows: Sequence[int],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
    allowed: np.ndarray | None,
) -> list[tuple[np.ndarray, bool]]:
    """The results for continuations, each of the prefix `rows[i]`, after one prefill of all prefixes."""
    spare = _batch_size(len(prefixes), batch_size) - len(prefixes)  # few batch sizes, as each is compiled
    tokens, lengths = padded([*prefixes, *[prefixes[0]] * spare])
    longest = max(map(len, continuations)) - 1
    capacity = bucket(tokens.shape[1] + longest, config.n_positions)
    cache = new_cache(params.mesh, StaticCache.init, config, batch_size=tokens.shape[0], capacity=capacity)
    logits, cache = prefill(params, config, tokens, cache, lengths)
    heads, likeliest = jax.device_get(_first_tokens(logits, allowed))
    logprobs = [[heads[row][ids[0]]] for row, ids in zip(rows, continuations, strict=True)]
    greedy = [bool(ids[0] == likeliest[row]) for row, ids in zip(rows, continuations, strict=True)]
    longer = [i for i, ids in enumerate(continuations) if len(ids) > 1]
    for start in range(0, len(longer), batch_size):
        part = longer[start : start + batch_size]
        parents = [rows[i] for i in part]
        chosen, best = _score_rows(
            params, config, cache, parents, [continuations[i] for i in part], batch_size, allowed
        )
        for i, values, is_best in zip(part, chosen, best, strict=False):
            count = len(continuations[i]) - 1
            logprobs[i] += values[:count].tolist()
            greedy[i] &= bool(np.all(is_best[:count]))
    return [(np.array(row, np.float32), is_greedy) for row, is_greedy in zip(logprobs, greedy, strict=True)]


def _score_rows(
    params: Params,
    config: GPT2Config,
    cache: KVCache,
    parents: Sequence[int],
    rows: list[Sequence[int]],
    batch_size: int,
    allowed: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability, and whether it is the largest, of each row's tokens except its first: [R, T], R padded."""
    size = bucket(max(len(ids) for ids in rows) - 1, config.n_positions)
    count = _batch_size(len(rows), batch_size)
    tokens = np.zeros((2, count, size), np.int32)
    for row, ids in enumerate(rows):
        tokens[0, row, : len(ids) - 1] = ids[:-1]
        tokens[1, row, : len(ids) - 1] = ids[1:]
    spare = [0] * (count - len(rows))
    inputs, targets, chosen = jax.device_put((tokens[0], tokens[1], np.array([*parents, *spare], np.int32)))
    return jax.device_get(_continue(params, config, cache, chosen, inputs, targets, allowed))


def _batch_size(count: int, most: int) -> int:
    """A power of two that is at least `count`, or `most`."""
    return min(power_of_two(count), most)


@jax.jit
def _first_tokens(logits: jax.Array, allowed: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of all tokens [B, V], and the most likely one of those that are allowed [B]."""
    return jax.nn.log_softmax(logits), jnp.argmax(only_allowed(logits, allowed), axis=-1)


@partial(jax.jit, static_argnames="config")
def _continue(
    params: Params,
    config: GPT2Config,
    cache: KVCache,
    parents: jax.Array,
    inputs: jax.Array,
    targets: jax.Array,
    allowed: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target [R, T], and whether it is the most likely token, after the rows `parents` [R]."""
    logits = run(params, config, inputs, cache.select(parents)).logits
    rows = only_allowed(logits.reshape(-1, logits.shape[-1]), allowed)
    likeliest = jnp.argmax(rows, axis=-1).reshape(targets.shape)
    return logprobs_of(logits, targets), likeliest == targets
