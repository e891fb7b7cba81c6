"""How many of a draft's guesses are kept, and what follows them: the rules that make speculative decoding exact."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.decoding.params import DecodingParams
from llorch_jax.decoding.speculative.drafts import Proposal
from llorch_jax.decoding.steps import DecodeState, choose

_ACCEPTING, _RESIDUAL = 1, 2  # folded into a position's key; `drafts` has 0


class Verdict(NamedTuple):
    """The outcome of a verification step.

    Attributes:
        state: of decoding after the new tokens, its cache as it was.
        tokens: int32 [B, D + 1], of which the first `new` are new tokens.
        logprobs: float32 [B, D + 1], of these tokens.
        new: int32 [B], number of new tokens; 0 in rows that were done.
        accepted: int32 [B], number of guesses among them.
    """

    state: DecodeState
    tokens: jax.Array
    logprobs: jax.Array
    new: jax.Array
    accepted: jax.Array


@struct.dataclass
class _Given:
    """The sampler that takes a token that has been chosen already, int32 [B]."""

    token: jax.Array
    needs_key: bool = struct.field(pytree_node=False, default=False)
    needs_history: bool = struct.field(pytree_node=False, default=False)

    def init(self, batch: int) -> None:
        """It has no state."""

    def sample(self, logits: jax.Array, keys: jax.Array, history: Any, eos_ids: jax.Array, state: Any) -> Any:
        """The token."""
        return self.token, state


def match(
    decoding: DecodingParams, state: DecodeState, first: jax.Array, logits: jax.Array, proposal: Proposal
) -> Verdict:
    """The sampler's own choices, each as plain decoding makes it: with its position's key, after the tokens before it.

    Guesses are accepted as long as they are the same. For guesses that are not drawn this is the paper's rule: a guess
    is accepted with its probability under the target, and what is chosen instead has the target's distribution without
    it.

    Args:
        decoding: how tokens are chosen.
        state: of decoding before the guesses.
        first: int32 [B], position of the first guess.
        logits: float32 [B, D + 1, V] of the target.
        proposal: D guesses.
    """
    return _walk(decoding, state, first, logits, proposal.tokens, proposal.count, None)


def _walk(
    decoding: DecodingParams,
    state: DecodeState,
    first: jax.Array,
    logits: jax.Array,
    guesses: jax.Array,
    count: jax.Array,
    given: jax.Array | None,
) -> Verdict:
    """Decodes column by column as long as the `count` int32 [B] guesses [B, D] are what is chosen.

    What is chosen is `given` int32 [B, D + 1], or up to the sampler where that is None.
    """
    columns = logits.shape[1]

    def step(carry: Any, column: Any) -> tuple[Any, Any]:
        before, alive, accepted = carry
        number, values, guess, token = column
        own = decoding if token is None else dataclasses.replace(decoding, sampler=_Given(token))
        held = dataclasses.replace(before, finished=before.finished | ~alive)
        after = choose(own, values, held, first + number)
        after = dataclasses.replace(
            after,
            token=jnp.where(alive, after.token, before.token),
            finished=jnp.where(alive, after.finished, before.finished),
            sampler_state=_rows_where(alive, after.sampler_state, before.sampler_state),
        )
        agreed = alive & (number < count) & (after.token == guess)
        carry = after, agreed & ~after.done, accepted + agreed.astype(jnp.int32)
        return carry, (after.token, after.logprob, alive)

    numbers = jnp.arange(columns, dtype=jnp.int32)
    padded = jnp.pad(guesses, ((0, 0), (0, 1)))
    by_column = (numbers, *(None if x is None else jnp.moveaxis(x, 1, 0) for x in (logits, padded, given)))
    start = dataclasses.replace(state, cache=None, top=None), ~state.done, jnp.zeros_like(first)
    (after, _, accepted), (tokens, logprobs, taken) = jax.lax.scan(step, start, by_column)
    return Verdict(
        state=dataclasses.replace(after, cache=state.cache),
        tokens=tokens.T,
        logprobs=logprobs.T,
        new=jnp.sum(taken, axis=0, dtype=jnp.int32),
        accepted=accepted,
    )


def _rows_where(rows: jax.Array, new: Any, old: Any) -> Any:
    """Of two pytrees of arrays [B, ...], the new one in the rows where bool [B] is true."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def reject(
    decoding: DecodingParams, state: DecodeState, first: jax.Array, logits: jax.Array, proposal: Proposal
) -> Verdict:
    """Rejection sampling (Leviathan et al. 2023, algorithm 1); arguments as `match`."""
    keys = _position_keys(decoding, first, logits.shape[1])
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    target = jax.nn.log_softmax(jax.vmap(decoding.sampler.filtered, 1, 1)(logits), axis=-1)
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
    chosen = jnp.where(columns < accepted[:, None], guesses, other[:, None])
    return _walk(decoding, state, first, logits, proposal.tokens, accepted, chosen)


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
    possible = jnp.sum(rest, axis=-1, keepdims=True) > 0  # false only where p and q are equal except for rounding
    return jnp.where(rejected[:, None] & possible, jnp.log(rest), target)


def _position_keys(decoding: DecodingParams, first: jax.Array, count: int) -> jax.Array:
    """Keys [B, count] of the positions from `first` int32 [B] on, as plain decoding has them."""
    positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(decoding.keys, positions)


def _prefix(agreed: jax.Array, count: jax.Array) -> jax.Array:
    """int32 [B], how many of the first `count` guesses agree, bool [B, D], before the first that does not."""
    columns = jnp.arange(agreed.shape[1], dtype=jnp.int32)[None]
    return jnp.sum(
        jnp.cumprod((agreed & (columns < count[:, None])).astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32
    )
