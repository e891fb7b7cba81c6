"""Log-likelihoods of several continuations of one text, which share the cache of that text."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.checks import check_context
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.loop import prefill
from llorch_jax.errors import TokenError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.text.vocabulary import tokenizer_of
from llorch_jax.tokenizer import Tokenizer

ROWS = 8  # continuations that are scored at once


@dataclasses.dataclass(frozen=True)
class Choice:
    """How likely a continuation is.

    Attributes:
        text: the continuation as given.
        token_ids: its tokens.
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
    to the continuation, both are encoded together, and the continuation's tokens are those behind as many as the
    prefix alone has. After an empty prefix the model's begin-of-text (else end-of-text) token stands before the
    continuations.

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
    """
    if isinstance(continuations, str) or not continuations:
        raise TokenError(f"continuations: expected a list of at least one text, got {continuations!r}")
    tokenizer = tokenizer_of(model)
    pairs = [encode_pair(tokenizer, prefix, text, first_token(model.config)) for text in continuations]
    for i, (_, ids) in enumerate(pairs):
        if not ids:
            raise TokenError(f"continuations[{i}]: expected at least one token, got {continuations[i]!r}")
    found = score_continuations(model.params, model.config, pairs[0][0], [ids for _, ids in pairs])
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
    """Log-probabilities of the tokens of each continuation, and whether each token is the most likely one.

    Args:
        params: of a model of this configuration.
        config: the model's hyperparameters.
        prefix: token ids, at least one.
        continuations: token ids, at least one each; the last one of each needs no position in the context.

    Returns:
        For each a float32 [T] and a bool.

    Raises:
        TokenError: ids are outside the vocabulary.
        CapacityError: a continuation does not fit the context.
    """
    longest = max(len(ids) for ids in continuations) - 1
    check_context(config, np.int32(len(prefix)), longest)
    capacity = bucket(len(prefix) + longest, config.n_positions)
    cache = StaticCache.init(config, batch_size=1, capacity=capacity)
    logits, cache = prefill(params, config, [list(prefix)], cache)
    head = np.asarray(jax.nn.log_softmax(logits[0]))
    scores = [[head[ids[0]]] for ids in continuations]
    greedy = [bool(ids[0] == head.argmax()) for ids in continuations]
    longer = [i for i, ids in enumerate(continuations) if len(ids) > 1]
    for start in range(0, len(longer), ROWS):
        rows = longer[start : start + ROWS]
        chosen, best = _score_rows(params, config, cache, [continuations[i] for i in rows])
        for i, logprobs, is_best in zip(rows, chosen, best, strict=False):
            count = len(continuations[i]) - 1
            scores[i] += logprobs[:count].tolist()
            greedy[i] &= bool(np.all(is_best[:count]))
    return [(np.array(row, np.float32), is_greedy) for row, is_greedy in zip(scores, greedy, strict=True)]


def _score_rows(
    params: Params, config: GPT2Config, cache: KVCache, rows: list[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability, and whether it is the largest, of each row's tokens but its first: [R, T], R padded."""
    size = bucket(max(len(ids) for ids in rows) - 1, config.n_positions)
    count = next(n for n in (1, 2, 4, ROWS) if n >= len(rows))  # few batch sizes, as each is compiled
    tokens = np.zeros((2, count, size), np.int32)
    for i, ids in enumerate(rows):
        tokens[0, i, : len(ids) - 1], tokens[1, i, : len(ids) - 1] = ids[:-1], ids[1:]
    return jax.device_get(_continue(params, config, cache, *jax.device_put(tuple(tokens))))


@partial(jax.jit, static_argnames="config")
def _continue(
    params: Params, config: GPT2Config, cache: KVCache, inputs: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target [B, T], and whether it is the most likely token, after a cache of one row."""
    logits = run(params, config, inputs, cache.fork(inputs.shape[0])).logits
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets
