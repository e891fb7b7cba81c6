"""Transforms of logits that need nothing but the logits: each takes and returns float32 [B, V].

Settings are traced, [] for all rows or [B], one per row. What is cut off becomes minus infinity; the most likely token
never is. Logits that are minus infinity already stay so, and count for nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llorch_jax.sampling.base import MASKED, per_row

Finish = Callable[[jax.Array, jax.Array | None], jax.Array]  # of logits [B, C] and their ids, None where C is V
_SIZES = (1024, 8192)
_FEW = (64, 256)  # tried before where there is a top-k
_COLDEST = 1e-30  # logits divided by less could overflow float32


def apply_temperature(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits divided by a temperature."""
    return logits / per_row(temperature)


def dynamic_temperature(logits: jax.Array, temperature: jax.Array, spread: jax.Array, exponent: jax.Array) -> jax.Array:
    """A temperature for each row float32 [B], within `spread` of the given one, by the entropy of the distribution.

    As in llama.cpp: lowest + (highest - lowest) * (entropy / largest possible entropy) ** exponent. Rows whose spread
    is 0 keep their temperature.

    Args:
        logits: float32 [B, V].
        temperature: float32 [] or [B].
        spread: float32 [] or [B]; the lowest temperature is not below 0.
        exponent: float32 [] or [B].
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    entropy = _entropy(jnp.exp(logprobs), logprobs)[:, 0]
    count = jnp.sum(jnp.isfinite(logits), axis=-1).astype(logits.dtype)
    share = jnp.clip(entropy / jnp.log(jnp.maximum(count, 2)), 0, 1)
    lowest = jnp.maximum(temperature - spread, 0)
    dynamic = lowest + (temperature + spread - lowest) * share**exponent
    return jnp.where((spread > 0) & (count > 1), jnp.maximum(dynamic, _COLDEST), temperature)


def apply_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Keeps each row's `top_k` (int32) largest (Fan et al. 2018, section 5.4)."""
    return _mask_unsorted(logits, top_k, None)


def apply_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the most likely tokens that reach the probability `top_p` (Holtzman et al. 2020, section 3.1)."""
    return _mask_unsorted(logits, None, top_p)


def apply_min_p(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Keeps tokens at least `min_p` times as likely as the most likely one (Nguyen et al. 2024, 2407.01082)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    most = jnp.max(probabilities, axis=-1, keepdims=True)
    return _keep(logits, probabilities >= per_row(min_p) * most)


def apply_typical_p(logits: jax.Array, typical_p: jax.Array) -> jax.Array:
    """Keeps the tokens whose surprise is nearest to the entropy, until they reach the probability `typical_p`.

    Locally typical sampling (Meister et al. 2023, 2202.00666, section 4).
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(logprobs)
    distance = jnp.abs(-logprobs - _entropy(probabilities, logprobs))
    distance = jnp.where(probabilities > 0, distance, jnp.inf)

    def limit(size: int, *larger: int) -> jax.Array:
        found, reached = _reaching(distance, probabilities, typical_p, size)
        return jax.lax.cond(jnp.all(reached), lambda: found, lambda: limit(*larger)) if larger else found

    return jnp.where(distance <= limit(*sizes_to_sort(logits.shape[-1])), logits, MASKED)


def _reaching(
    distance: jax.Array, probabilities: jax.Array, mass: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The distance [B, 1] up to which the `count` nearest tokens reach a mass, and whether they do, bool [B, 1]."""
    negative, order = jax.lax.top_k(-distance, count)
    sums = jnp.cumsum(jnp.take_along_axis(probabilities, order, axis=-1), axis=-1)
    short = jnp.sum(sums < per_row(mass), axis=-1, keepdims=True)
    return -jnp.take_along_axis(negative, jnp.minimum(short, count - 1), axis=-1), short < count


def apply_epsilon_cutoff(logits: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Keeps tokens of probability `epsilon` and more (Hewitt et al. 2022, 2210.15191, section 4)."""
    return _keep(logits, jax.nn.softmax(logits, axis=-1) >= per_row(epsilon))


def apply_eta_cutoff(logits: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Keeps tokens of probability min(epsilon, sqrt(epsilon) exp(-entropy)) and more (Hewitt et al. 2022)."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probabilities, epsilon = jnp.exp(logprobs), per_row(epsilon)
    eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_entropy(probabilities, logprobs)))
    return _keep(logits, probabilities >= eta)


def apply_top_n_sigma(logits: jax.Array, n: jax.Array) -> jax.Array:
    """Keeps logits within `n` standard deviations of the largest (Tang et al. 2024, 2411.07641, section 3)."""
    finite = jnp.isfinite(logits)
    count = jnp.sum(finite, axis=-1, keepdims=True, dtype=logits.dtype)
    mean = jnp.sum(jnp.where(finite, logits, 0), axis=-1, keepdims=True) / count
    variance = jnp.sum(jnp.where(finite, jnp.square(logits - mean), 0), axis=-1, keepdims=True) / count
    most = jnp.max(logits, axis=-1, keepdims=True)
    return _keep(logits, logits >= most - per_row(n) * jnp.sqrt(variance))


def apply_xtc(logits: jax.Array, keys: jax.Array, probability: jax.Array, threshold: jax.Array) -> jax.Array:
    """With some probability, cuts off all tokens that reach a threshold but the least likely of them.

    XTC ("exclude top choices") as in llama.cpp: it does nothing where fewer than two tokens reach the threshold. Tokens
    that are cut off already count as none.

    Args:
        logits: float32 [B, V].
        keys: one per row [B].
        probability: with which a row is transformed, 0 .. 1.
        threshold: probability of a token that counts as a top choice; above 0.5 there cannot be two.
    """
    active = jax.vmap(jax.random.uniform)(keys) < jnp.broadcast_to(probability, keys.shape)
    probabilities = jax.nn.softmax(logits, axis=-1)
    top = (probabilities >= per_row(threshold)) & (logits > MASKED)
    least = jnp.argmin(jnp.where(top, probabilities, jnp.inf), axis=-1)
    spared = jnp.arange(logits.shape[-1])[None] == least[:, None]
    active &= jnp.sum(top, axis=-1) >= 2
    return jnp.where(active[:, None] & top & ~spared, MASKED, logits)


def sizes_to_sort(size: int) -> tuple[int, ...]:
    """How many of `size` values are sorted to reach a probability, at the first attempt and at later ones."""
    return (*(few for few in _SIZES if few < size), size)


def keep_sorted(
    values: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None, total: jax.Array | None = None
) -> jax.Array:
    """Which of the logits [B, C], sorted downwards, are kept: bool [B, C]. The first always is.

    Top-p sees what top-k leaves. `total` [B, 1] is the logarithm of the sum of exp over all logits, where these are not
    all: it stands for rows without a top-k, or with one that reaches beyond these.
    """
    rank = jnp.arange(values.shape[-1], dtype=jnp.int32)[None]
    kept = jnp.ones(values.shape, bool) if top_k is None else rank < jnp.broadcast_to(per_row(top_k), values.shape)
    if top_p is None:
        return kept
    left = jnp.where(kept, values, MASKED)
    if total is None:
        probabilities = jax.nn.softmax(left, axis=-1)
    else:
        probabilities = jnp.exp(left - total)
        if top_k is not None:
            bounded = per_row(top_k) <= values.shape[-1]
            probabilities = jnp.where(bounded, jax.nn.softmax(left, axis=-1), probabilities)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    limit = jnp.where(top_p < 1, top_p, jnp.inf)  # sums of many probabilities may round to 1 before the last
    return (kept & (before < per_row(limit))) | (rank == 0)


def sort_enough(
    values: jax.Array,
    top_k: jax.Array | None,
    top_p: jax.Array,
    finish: Finish,
    counted: jax.Array | None = None,
) -> jax.Array:
    """What `finish` makes of the logits that top-k and top-p leave: the largest ones, sorted, with their ids.

    More of them are sorted only if fewer are not enough in some row.

    Args:
        values: logits [B, V].
        top_k: int32 [B], the largest int32 where it is off; None where it is off in all rows.
        top_p: float32 [] or [B], 1 where it is off.
        finish: of logits [B, C] and ids int32 [B, C]; compiled for every C.
        counted: bool [B], the rows that count; None for all.
    """
    limited = None
    if top_k is not None:
        limited = per_row(top_k) < jnp.iinfo(jnp.int32).max
        top_k = jnp.where(limited[:, 0], jnp.minimum(top_k, values.shape[-1]), top_k)

    def total_of(values: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(values, axis=-1, keepdims=True)

    if limited is None:
        total = total_of(values)
    else:  # rows with a top-k need no sum over all logits
        unlimited = ~limited if counted is None else ~limited & counted[:, None]
        total = jax.lax.cond(jnp.any(unlimited), total_of, lambda x: jnp.zeros_like(x[:, :1]), values)

    def attempt(size: int, *larger: int) -> jax.Array:
        largest, ids = jax.lax.top_k(values, size)

        def finish_sorted() -> jax.Array:
            kept = keep_sorted(largest, top_k, top_p, total)
            return finish(jnp.where(kept, largest, MASKED), ids)

        if not larger:
            return finish_sorted()
        reached = jnp.sum(jnp.exp(largest - total), axis=-1, keepdims=True) >= per_row(top_p)
        enough = reached & (per_row(top_p) < 1)
        if top_k is not None and limited is not None:
            enough = jnp.where(limited, per_row(top_k) <= size, enough)
        if counted is not None:
            enough = enough | ~counted[:, None]
        return jax.lax.cond(jnp.all(enough), finish_sorted, lambda: attempt(*larger))

    few = [] if top_k is None else [size for size in _FEW if size < values.shape[-1]]
    return attempt(*few, *sizes_to_sort(values.shape[-1]))


def _mask_unsorted(logits: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None) -> jax.Array:
    values, ids = jax.lax.top_k(logits, logits.shape[-1])
    masked = jnp.where(keep_sorted(values, top_k, top_p), values, MASKED)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[rows, ids].set(masked)


def _keep(logits: jax.Array, kept: jax.Array) -> jax.Array:
    """Logits where `kept` or largest, minus infinity elsewhere."""
    return jnp.where(kept | (logits == jnp.max(logits, axis=-1, keepdims=True)), logits, MASKED)


def _entropy(probabilities: jax.Array, logprobs: jax.Array) -> jax.Array:
    """In nats, [B, 1]."""
    terms = jnp.where(probabilities > 0, probabilities * logprobs, 0)
    return -jnp.sum(terms, axis=-1, keepdims=True)
