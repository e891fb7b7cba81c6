"""How many of a draft's guesses are kept, and what follows them: the rules that make speculative decoding exact."""

import jax
import jax.numpy as jnp

from llorch_jax.decoding.request import Policy
from llorch_jax.decoding.speculative.drafts import Proposal

_ACCEPTING, _RESIDUAL = 1, 2  # folded into a position's key; `drafts` has 0


def match(policy: Policy, first: jax.Array, logits: jax.Array, proposal: Proposal) -> tuple[jax.Array, jax.Array]:
    """The sampler's own choices, with each position's key; guesses are accepted as long as they are the same.

    For guesses that are not drawn this is the paper's rule: a guess is accepted with its probability under the target,
    and what is chosen instead has the target's distribution without it.

    Args:
        policy: how tokens are chosen.
        first: int32 [B], position of the first guess.
        logits: float32 [B, D + 1, V] of the target.
        proposal: D guesses.

    Returns:
        int32 [B, D + 1], of which one more than the guesses accepted are the next tokens; and how many guesses are
        accepted, int32 [B].
    """
    keys = _position_keys(policy, first, logits.shape[1])
    chosen = jax.vmap(policy.sampler, (1, 1), 1)(logits, keys)
    return chosen, _prefix(chosen[:, :-1] == proposal.tokens, proposal.count)


def reject(policy: Policy, first: jax.Array, logits: jax.Array, proposal: Proposal) -> tuple[jax.Array, jax.Array]:
    """Rejection sampling (Leviathan et al. 2023, algorithm 1); arguments and results as `match`."""
    keys = _position_keys(policy, first, logits.shape[1])
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    target = jax.nn.log_softmax(jax.vmap(policy.sampler.filtered, 1, 1)(logits), axis=-1)
    assert proposal.logits is not None
    draft = jax.nn.log_softmax(proposal.logits, axis=-1)
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(fold(keys[:, :-1], _ACCEPTING))
    agreed = jnp.log(uniform) < acceptance(target[:, :-1], draft, proposal.tokens)
    accepted = _prefix(agreed, proposal.count)
    here = accepted[:, None, None]
    guessed = jnp.take_along_axis(draft, jnp.minimum(here, draft.shape[1] - 1), axis=1)[:, 0]
    rest = residual(jnp.take_along_axis(target, here, axis=1)[:, 0], guessed, accepted < proposal.count)
    key = jnp.take_along_axis(fold(keys, _RESIDUAL), accepted[:, None], axis=1)[:, 0]
    other = jax.vmap(jax.random.categorical)(key, rest).astype(jnp.int32)
    columns = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    guesses = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    return jnp.where(columns < accepted[:, None], guesses, other[:, None]), accepted


def acceptance(target: jax.Array, draft: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log of the probability min(1, p(x) / q(x)) that a guess is accepted.

    Args:
        target: log p, float32 [B, D, V].
        draft: log q, float32 [B, D, V].
        tokens: the guesses x, int32 [B, D].

    Returns:
        float32 [B, D].
    """
    p, q = (jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0] for x in (target, draft))
    return jnp.minimum(p - q, 0.0)


def residual(target: jax.Array, draft: jax.Array, rejected: jax.Array) -> jax.Array:
    """Logits of the token that follows the accepted guesses: of norm(max(0, p - q)) after a rejection, else of p.

    Args:
        target: log p, float32 [B, V].
        draft: log q, float32 [B, V].
        rejected: bool [B].

    Returns:
        float32 [B, V].
    """
    rest = jnp.maximum(jnp.exp(target) - jnp.exp(draft), 0.0)
    possible = jnp.sum(rest, axis=-1, keepdims=True) > 0  # not so only where p and q are equal but for rounding
    return jnp.where(rejected[:, None] & possible, jnp.log(rest), target)


def _position_keys(policy: Policy, first: jax.Array, count: int) -> jax.Array:
    """Keys [B, count] of the positions from `first` int32 [B] on, as plain decoding has them."""
    positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(policy.keys, positions)


def _prefix(agreed: jax.Array, count: jax.Array) -> jax.Array:
    """int32 [B], how many of the first `count` guesses agree, bool [B, D], before the first that does not."""
    columns = jnp.arange(agreed.shape[1], dtype=jnp.int32)[None]
    return jnp.sum(
        jnp.cumprod((agreed & (columns < count[:, None])).astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32
    )
