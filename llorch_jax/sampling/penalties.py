"""Transforms of logits by the tokens that a row already has: each takes and returns float32 [B, V].

Settings are traced, [] for all rows or [B], one per row.
"""

import jax
import jax.numpy as jnp

from llorch_jax.sampling.base import MASKED, History, per_row

_LARGEST_EXPONENT = 80.0  # of e, for which float32 still has a number


def apply_repetition_penalty(
    logits: jax.Array, history: History, penalty: jax.Array, last: jax.Array | None = None
) -> jax.Array:
    """Divides positive and multiplies negative logits of tokens that occurred, in the prompt too, by `penalty`.

    Keskar et al. 2019, 1909.05858, section 4.1, as transformers does it. With `last` (int32) only the row's last
    `last` tokens count, as in llama.cpp; negative numbers mean all.
    """
    seen = _scatter_max(logits, history, history.filled & _recent(history, last))
    penalised = jnp.where(logits < 0, logits * per_row(penalty), logits / per_row(penalty))
    return jnp.where(seen, penalised, logits)


def apply_frequency_penalty(
    logits: jax.Array, history: History, penalty: jax.Array, last: jax.Array | None = None
) -> jax.Array:
    """Subtracts `penalty` times the number of times that a token was generated (not counting the prompt).

    `last` as for the repetition penalty.
    """
    return logits - per_row(penalty) * generated_counts(logits, history, last)


def apply_presence_penalty(
    logits: jax.Array, history: History, penalty: jax.Array, last: jax.Array | None = None
) -> jax.Array:
    """Subtracts `penalty` from tokens that were generated (not counting the prompt); `last` as above."""
    return logits - per_row(penalty) * (generated_counts(logits, history, last) > 0).astype(logits.dtype)


def generated_counts(logits: jax.Array, history: History, last: jax.Array | None = None) -> jax.Array:
    """float32 [B, V], how often each token was generated, among the row's last `last` tokens where that is given."""
    slots = jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None]
    generated = history.filled & (slots >= history.prompts[:, None]) & _recent(history, last)
    return jnp.zeros_like(logits).at[_rows(history), history.tokens].add(generated.astype(jnp.float32))


def apply_no_repeat_ngram(logits: jax.Array, history: History, size: jax.Array) -> jax.Array:
    """Bans tokens that would make a sequence of `size` (int32) tokens occur again; 0 bans none."""
    size = jnp.broadcast_to(size, history.lengths.shape)[:, None]
    lengths = match_lengths(history, jnp.max(size) - 1, None)
    return jnp.where(_scatter_max(logits, history, history.filled & (lengths >= size - 1) & (size > 0)), MASKED, logits)


def apply_dry(
    logits: jax.Array,
    history: History,
    multiplier: jax.Array,
    base: jax.Array,
    allowed_length: jax.Array,
    breakers: jax.Array,
) -> jax.Array:
    """Penalises tokens that would prolong a repetition, the more the longer it is.

    DRY ("don't repeat yourself") as in llama.cpp: where the last n tokens occurred before and were followed by a token,
    n at least `allowed_length`, this token's logit loses multiplier * base ** (n - allowed_length). Breakers themselves
    are never penalised.

    Args:
        logits: float32 [B, V].
        history: of the rows.
        multiplier: of the penalty; 0 for none.
        base: of the power, 1 or more.
        allowed_length: int32, repetitions up to this length cost nothing.
        breakers: int32 [1 or B, E], tokens that no repetition extends over, filled up with -1; E may be 0.
    """
    lengths = match_lengths(history, None, breakers)
    excess = (lengths - per_row(allowed_length)).astype(jnp.float32)
    power = jnp.exp(jnp.minimum(excess * jnp.log(per_row(base)), _LARGEST_EXPONENT))
    penalised = history.filled & (lengths >= per_row(allowed_length))
    penalty = jnp.zeros_like(logits).at[_rows(history), history.tokens].max(jnp.where(penalised, power, 0))
    if breakers.size:
        exempt = jnp.broadcast_to(jnp.where(breakers < 0, logits.shape[1], breakers), (len(logits), breakers.shape[1]))
        penalty = penalty.at[jnp.arange(len(logits))[:, None], exempt].set(0, mode="drop")
    return logits - jnp.where(penalty > 0, per_row(multiplier) * penalty, 0)


@jax.jit  # compiled once for calls outside jit; inside, it is inlined
def match_lengths(history: History, limit: jax.Array | None, breakers: jax.Array | None) -> jax.Array:
    """int32 [B, S]: how many tokens before each place are those before the row's end, up to `limit` and a breaker."""
    tokens, ends = history.tokens, history.lengths[:, None]
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

    def longer(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        count, alive, lengths = state
        here, last = slots - 1 - count, ends - 1 - count
        wanted = jnp.take_along_axis(tokens, jnp.maximum(last, 0), axis=1)
        alive &= (here >= 0) & (jnp.take_along_axis(tokens, jnp.maximum(here, 0), axis=1) == wanted)
        if breakers is not None and breakers.size:
            alive &= ~jnp.any(wanted == breakers, axis=1, keepdims=True)
        return count + 1, alive, lengths + alive.astype(jnp.int32)

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, alive, _ = state
        return jnp.any(alive) & (True if limit is None else count < limit)

    start = (jnp.int32(0), history.filled, jnp.zeros(tokens.shape, jnp.int32))
    return jax.lax.while_loop(unfinished, longer, start)[2]


def apply_bad_words(logits: jax.Array, history: History, words: jax.Array, sizes: jax.Array) -> jax.Array:
    """Bans the last token of each sequence whose other tokens the row ends with.

    Args:
        logits: float32 [B, V].
        history: of the rows.
        words: int32 [1 or B, W, M], sequences padded on the left.
        sizes: int32 [1 or B, W], tokens of each, 1 .. M; 0 if there is none.
    """
    count = words.shape[2]
    places = history.lengths[:, None] - count + 1 + jnp.arange(count - 1, dtype=jnp.int32)[None]
    ends = jnp.take_along_axis(history.tokens, jnp.maximum(places, 0), axis=1)  # [B, M - 1]
    equal = (ends[:, None] == words[:, :, :-1]) & (places >= 0)[:, None]
    needed = jnp.arange(count - 1)[None, None] >= count - sizes[..., None]
    banned = jnp.all(equal | ~needed, axis=-1) & (sizes > 0)  # [B, W]
    rows = jnp.arange(logits.shape[0])[:, None]
    last = jnp.broadcast_to(words[:, :, -1], banned.shape)
    return jnp.where(jnp.zeros(logits.shape, bool).at[rows, last].max(banned), MASKED, logits)


def apply_min_new_tokens(logits: jax.Array, history: History, eos_ids: jax.Array, count: jax.Array) -> jax.Array:
    """Bans the ids that end a row, int32 [B, E] filled up with -1, until it has `count` (int32) generated tokens."""
    rows = jnp.arange(logits.shape[0])[:, None]
    ids = jnp.where(eos_ids < 0, logits.shape[-1], eos_ids)
    ending = jnp.zeros(logits.shape, bool).at[rows, ids].set(True, mode="drop")
    return jnp.where((history.generated[:, None] < per_row(count)) & ending, MASKED, logits)


def apply_forced_tokens(logits: jax.Array, history: History, forced: jax.Array) -> jax.Array:
    """Leaves only the token forced[:, i], int32 [1 or B, N], for the i-th generated token; negative forces none."""
    step, forced = history.generated[:, None], jnp.broadcast_to(forced, (logits.shape[0], forced.shape[1]))
    there = jnp.take_along_axis(forced, jnp.minimum(step, forced.shape[1] - 1), axis=1)
    token = jnp.where(step < forced.shape[1], there, -1)
    wanted = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None] == token
    return jnp.where(wanted, 0.0, jnp.where(token >= 0, MASKED, logits))


def apply_logit_bias(logits: jax.Array, ids: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds bias[:, i] to the logits of ids[:, i], int32 [1 or B, N]."""
    rows, shape = jnp.arange(logits.shape[0])[:, None], (logits.shape[0], ids.shape[1])
    return logits.at[rows, jnp.broadcast_to(ids, shape)].add(jnp.broadcast_to(bias, shape))


def _recent(history: History, last: jax.Array | None) -> jax.Array:
    """bool [B, S] or [], which places are among the row's last `last`, int32 [] or [B]; negative or None: all."""
    if last is None:
        return jnp.asarray(True)
    first = jnp.where(last < 0, 0, history.lengths - last)
    return jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None] >= first[:, None]


def _rows(history: History) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(history.tokens.shape[0])[:, None], history.tokens.shape)


def _scatter_max(logits: jax.Array, history: History, where: jax.Array) -> jax.Array:
    """bool [B, V], which tokens stand at a place of the history for which `where` [B, S] holds."""
    return jnp.zeros(logits.shape, bool).at[_rows(history), history.tokens].max(where)
