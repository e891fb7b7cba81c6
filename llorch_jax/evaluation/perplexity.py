"""How likely a model finds a text: log-probabilities per token, perplexity, bits per byte."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from llorch_jax.checks import check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.scoring import token_logprobs
from llorch_jax.errors import LlorchError, TokenError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.params import Params
from llorch_jax.text.vocabulary import tokenizer_of
from llorch_jax.tracing import whole


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities of a text.

    Attributes:
        token_ids: of the tokens scored.
        logprobs: natural log-probability of each, given those before it.
        num_bytes: UTF-8 bytes of the tokens scored.
    """

    token_ids: list[int]
    logprobs: list[float]
    num_bytes: int

    @property
    def total(self) -> float:
        """Log-probability of the whole text, in nats."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability per token; infinity where that is beyond a float."""
        return exp_of_loss(-self.total / len(self.logprobs))

    @property
    def bits_per_byte(self) -> float:
        """Mean negative log2-probability per UTF-8 byte, which compares models with different tokenizers."""
        return -self.total / math.log(2) / self.num_bytes


def exp_of_loss(loss: float) -> float:
    """Perplexity of a mean loss in nats; infinity where it is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def score(model: Model, text: str, *, stride: int | None = None) -> Score:
    """Log-probability of every token of a text.

    The model's begin-of-text token is put before the text, so that the first token is scored as well; a model
    without one scores from the second token on. A text longer than the context is read in windows that overlap: each
    token is then scored with at least n_positions - stride tokens before it, as in transformers' guide to perplexity.

    Args:
        model: from `load`.
        text: what to score.
        stride: how far a window moves on, 1 .. n_positions; half of n_positions by default.

    Raises:
        ModelError: the model has no tokenizer.
        TokenError: there is no token to score.
        NonFiniteError: the model's logits are NaN or infinite.
        LlorchError: the stride is out of range.
    """
    tokenizer, config = tokenizer_of(model), model.config
    stride = max(1, config.n_positions // 2) if stride is None else stride
    whole("stride", stride, LlorchError, most=config.n_positions)
    ids = tokenizer.encode(text)
    given = [] if config.bos_token_id is None else [config.bos_token_id]
    ids = given + ids
    if len(ids) < 2:
        raise TokenError(f"text: expected at least {2 - len(given)} tokens to score, got {len(ids) - len(given)}")
    check_tokens(config, [ids])
    logprobs = np.concatenate(list(_windows(model.params, config, np.asarray(ids, np.int32), stride)))
    unscored = 0 if given else tokenizer.num_bytes(ids[0])
    return Score(ids[1:], logprobs.tolist(), len(text.encode()) - unscored)


def _windows(params: Params, config: GPT2Config, ids: np.ndarray, stride: int) -> Iterator[np.ndarray]:
    """The log-probabilities of ids[1:], window by window."""
    size, done = config.n_positions, 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + size + 1]  # the last id is a target only and needs no position
        end = start + len(window)
        if end > done:
            yield token_logprobs(params, config, window)[done - 1 - start :]
            done = end
        if end == len(ids):
            return
