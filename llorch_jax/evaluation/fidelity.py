"""What a cache costs in quality: its predictions compared with those of a cache that keeps everything exactly."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.cache.placement import new_cache
from llorch_jax.cache.static import StaticCache
from llorch_jax.checks import check_context, check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.loop import decode_step, prefill
from llorch_jax.decoding.scoring import check_finite
from llorch_jax.errors import CacheError, TokenError
from llorch_jax.evaluation.perplexity import exp_of_loss
from llorch_jax.params import Params
from llorch_jax.tracing import whole


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How far the predictions with a cache are from the model's own.

    Attributes:
        kl: mean Kullback-Leibler divergence KL(exact || with the cache) of the next token's distribution, in nats.
        agreement: share of tokens for which the most likely next token is the same.
        perplexity: of the text with the cache.
        exact_perplexity: of the text with a cache that keeps everything in float32.
        tokens: number of predictions compared.
        bytes: size of the cache at the end.
    """

    kl: float
    agreement: float
    perplexity: float
    exact_perplexity: float
    tokens: int
    bytes: int


def fidelity(params: Params, config: GPT2Config, tokens: Any, prompt: int, cache: KVCache) -> Fidelity:
    """Reads texts token by token with a cache and with an exact one, and compares what each predicts.

    The first `prompt` tokens are read at once, the others one by one, as in generation, so that a cache which evicts
    does so on the way. Predictions of the tokens from `prompt` + 1 on are compared: those that the cache had a part in.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        tokens: texts of equal length, int32 [B, T].
        prompt: 1 .. T - 2.
        cache: empty, for B rows; it is donated.

    Raises:
        TokenError: the tokens are misshapen or out of range, or the prompt is not shorter than they are.
        CapacityError: they do not fit the context or the cache.
        CacheError: the cache is not empty, or of another model.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    ids = np.asarray(check_tokens(config, tokens))
    batch, length = ids.shape
    whole("prompt", prompt, TokenError, most=length - 2)
    check_context(config, np.zeros(batch, np.int32), length - 1)
    if not cache.is_empty():
        raise CacheError(f"cache: expected an empty one, got rows of {np.asarray(cache.lengths).tolist()} tokens")
    exact: KVCache = new_cache(params.mesh, StaticCache.init, config, batch_size=batch, capacity=length - 1)
    exact, cache = (prefill(params, config, ids[:, :prompt], each)[1] for each in (exact, cache))
    sums = np.zeros(4)
    for step in range(prompt, length - 1):
        expected, exact = decode_step(params, config, ids[:, step], exact)
        got, cache = decode_step(params, config, ids[:, step], cache)
        sums += np.asarray(_compared(expected, got, ids[:, step + 1]), np.float64)
    check_finite(sums)
    count = batch * (length - 1 - prompt)
    kl, agreed, loss, exact_loss = (sums / count).tolist()
    return Fidelity(kl, agreed, exp_of_loss(loss), exp_of_loss(exact_loss), count, cache.memory_usage())


@jax.jit
def _compared(exact: jax.Array, got: jax.Array, targets: jax.Array) -> jax.Array:
    """Sums over the rows of logits [B, V]: divergence, agreement, and both losses of the targets [B]; float32 [4]."""
    expected, found = jax.nn.log_softmax(exact), jax.nn.log_softmax(got)
    divergence = jnp.sum(jnp.exp(expected) * (expected - found))
    agreed = jnp.sum((jnp.argmax(exact, -1) == jnp.argmax(got, -1)).astype(jnp.float32))
    losses = [-jnp.sum(jnp.take_along_axis(each, targets[:, None], axis=1)) for each in (found, expected)]
    return jnp.stack([divergence, agreed, *losses])
