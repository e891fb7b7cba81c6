"""Drafts for speculative decoding: guesses of the next tokens, by prompt lookup or by a smaller model."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.buckets import bucket
from llorch_jax.cache.placement import new_cache
from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.params import DecodingParams
from llorch_jax.decoding.steps import DecodeState, choose, prefill_step
from llorch_jax.errors import DraftError
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.tracing import whole

_DRAWING = 0  # folded into a position's key for the draw of a draft; `verification` has the other numbers


class Context(NamedTuple):
    """What a draft may use.

    Attributes:
        state: of decoding: `state.history` has the prompt and the new tokens of each row.
        first: int32 [B], the position in the target's cache of the first token to be guessed.
        decoding: how the target's tokens are chosen.
    """

    state: DecodeState
    first: jax.Array
    decoding: DecodingParams


@struct.dataclass
class Proposal:
    """Guesses of the next D tokens of every row.

    Attributes:
        tokens: int32 [B, D].
        count: int32 [B], number of guesses; the tokens after them are padding.
        logits: float32 [B, D, V], whose softmax they were drawn from; None where they are a function of the context.
        state: of the draft, for the next step.
    """

    tokens: jax.Array
    count: jax.Array
    logits: jax.Array | None
    state: Any


@runtime_checkable
class Draft(Protocol):
    """What speculative decoding calls: a pytree whose `length` D is static."""

    @property
    def length(self) -> int: ...

    @property
    def draws(self) -> bool:
        """Whether guesses of a random sampler are drawn from `Proposal.logits`, which needs rejection sampling."""
        ...

    def init(self, config: GPT2Config, tokens: np.ndarray, lengths: np.ndarray, new_tokens: np.ndarray) -> Any:
        """The state after prompts [B, T] of `lengths` [B], which `new_tokens` [B] will follow. Host; checks."""
        ...

    def propose(self, state: Any, context: Context) -> Proposal:
        """Guesses, in `jit`."""
        ...

    def rollback(self, state: Any, known: jax.Array) -> Any:
        """The state of the first `known` tokens, int32 [B], in `jit`."""
        ...


@struct.dataclass
class PromptLookup:
    """Guesses that the text repeats itself (Saxena 2023, "Prompt Lookup Decoding"; LLMA, Yang et al. 2023, 2304.04487).

    The newest place where the last `ngram` tokens, or fewer, occurred before is looked up; the longest match wins, and
    the tokens that followed there are the guess. Where fewer than `length` followed, they repeat with that period.

    Attributes:
        ngram: maximum number of tokens to match, 1 or more.
        length: guesses per step D. A step then runs D + 1 tokens per row; 8 such columns are cheap on a CPU.
    """

    ngram: int = struct.field(pytree_node=False, default=3)
    length: int = struct.field(pytree_node=False, default=7)

    @property
    def draws(self) -> bool:
        """Guesses are a function of the text."""
        return False

    def init(self, config: GPT2Config, tokens: np.ndarray, lengths: np.ndarray, new_tokens: np.ndarray) -> None:
        """It has no state; checks its settings."""
        whole("ngram", self.ngram, DraftError)
        whole("length", self.length, DraftError, most=config.n_positions)

    def propose(self, state: None, context: Context) -> Proposal:
        """What followed the newest match."""
        history, known = context.state.history.tokens, context.state.history.lengths
        place = self._last_match(history, known)  # of the last token of the match
        period = jnp.maximum(known - 1 - place, 1)[:, None]
        steps = jnp.arange(self.length, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(history, place[:, None] + 1 + steps % period, axis=1)
        return Proposal(tokens, jnp.where(place >= 0, self.length, 0), None, None)

    def _last_match(self, history: jax.Array, known: jax.Array) -> jax.Array:
        """int32 [B], where the longest, then newest match of a row's last tokens ends; -1 if there is none."""
        size = history.shape[1]
        places = jnp.arange(size, dtype=jnp.int32)[None]
        alive = places < known[:, None] - 1
        matched = jnp.zeros(history.shape, jnp.int32)
        for back in range(min(self.ngram, size)):
            shifted = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-1)[:, :size]
            last = jnp.take_along_axis(history, jnp.maximum(known - 1 - back, 0)[:, None], axis=1)
            alive &= (shifted == last) & (known[:, None] > back)
            matched += alive.astype(jnp.int32)
        best = jnp.argmax(matched * size + places, axis=1).astype(jnp.int32)
        return jnp.where(jnp.max(matched, axis=1) > 0, best, -1)

    def rollback(self, state: None, known: jax.Array) -> None:
        """It has no state."""


@struct.dataclass
class DraftModel:
    """Guesses by a smaller model with the same vocabulary (Leviathan et al. 2023, 2211.17192).

    It has a `StaticCache` of its own, which is one token behind the target's: a step first feeds two tokens, and is
    right after a rejected guess as well as after a full acceptance.

    Attributes:
        params: of the draft model.
        config: its hyperparameters.
        length: guesses per step D, 1 or more.
        coupled: with a random sampler, draw each guess with the key that the target's token will be drawn with, and
            accept it if both are equal, instead of the paper's rejection sampling. Fewer guesses are accepted, but the
            tokens are those of `generate_tokens` with the same key (Daliri et al. 2024, 2408.07978).
    """

    params: Params
    config: GPT2Config = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False, default=4)
    coupled: bool = struct.field(pytree_node=False, default=False)

    @property
    def draws(self) -> bool:
        """Whether guesses are drawn with separate keys."""
        return not self.coupled

    def init(self, config: GPT2Config, tokens: np.ndarray, lengths: np.ndarray, new_tokens: np.ndarray) -> StaticCache:
        """The draft model's cache of the prompts without their last tokens."""
        whole("length", self.length, DraftError, most=config.n_positions)
        if self.config.vocab_size != config.vocab_size:
            raise DraftError(
                f"draft: expected the model's vocab_size={config.vocab_size}, got {self.config.vocab_size}"
            )
        limit, longest = self.config.n_positions, int(np.max(np.asarray(lengths) + new_tokens)) - 1
        if longest > limit:
            raise DraftError(f"draft: expected a context of {longest} tokens, as long as the texts, got {limit}")
        capacity = bucket(tokens.shape[1] + int(np.max(new_tokens)), limit)
        cache = new_cache(
            self.params.mesh, StaticCache.init, self.config, batch_size=tokens.shape[0], capacity=capacity
        )
        _, cache = prefill_step(self.params, self.config, tokens[:, :limit], lengths, cache, fresh=True)
        return cache.crop(lengths - 1)

    def propose(self, state: StaticCache, context: Context) -> Proposal:
        """Guesses of plain decoding with the draft model, or drawn from what the sampler leaves of its logits."""
        decoding = context.decoding
        drawn = decoding.sampler.needs_key and self.draws

        def guess(logits: jax.Array, before: DecodeState, step: Any) -> tuple[DecodeState, jax.Array | None]:
            positions = context.first + step
            if not drawn:
                return choose(decoding, logits, before, positions), None
            logits = decoding.sampler.filtered(logits)
            keys = jax.vmap(jax.random.fold_in)(decoding.keys, positions)
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _DRAWING)
            token = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
            return dataclasses.replace(before, token=token), logits

        def step(carry: Any, number: jax.Array) -> tuple[Any, Any]:
            after, cache = carry
            logits, cache = self._feed(after.token[:, None], cache)
            after, drawn_from = guess(logits, after, number)
            return (after, cache), (after.token, drawn_from)

        history = context.state.history
        pair = jnp.stack([history.lengths - 2, history.lengths - 1], axis=1)
        logits, cache = self._feed(jnp.take_along_axis(history.tokens, pair, axis=1), state)
        after, drawn_from = guess(logits, dataclasses.replace(context.state, cache=None, top=None), 0)
        later = jnp.arange(1, self.length, dtype=jnp.int32)
        (_, cache), tail = jax.lax.scan(step, (after, cache), later)
        tokens, logits = jax.tree.map(_joined, (after.token, drawn_from), tail)
        return Proposal(tokens, jnp.full_like(history.lengths, self.length), logits, cache)

    def _feed(self, tokens: jax.Array, cache: StaticCache) -> tuple[jax.Array, StaticCache]:
        """Logits [B, V] after the last of tokens [B, T], and the cache with all of them."""
        out = run(self.params, self.config, tokens, cache, last=True)
        return out.logits, out.cache

    def rollback(self, state: StaticCache, known: jax.Array) -> StaticCache:
        """The cache of all known tokens except the last two."""
        return state.crop(known - 2)


def _joined(first: jax.Array, later: jax.Array) -> jax.Array:
    """[B, D, ...] from the first step's [B, ...] and the later steps' [D - 1, B, ...]."""
    return jnp.concatenate([first[:, None], jnp.moveaxis(later, 0, 1)], axis=1)
