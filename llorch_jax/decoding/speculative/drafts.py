"""Drafts for speculative decoding: guesses of the next tokens, by prompt lookup or by a smaller model."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.buckets import bucket
from llorch_jax.cache.static import StaticCache
from llorch_jax.checks import check_context
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.request import Policy
from llorch_jax.decoding.steps import prefill_step
from llorch_jax.errors import DraftError
from llorch_jax.model import run
from llorch_jax.params import Params

_DRAWING = 0  # folded into a position's key for the draw of a draft; `verification` has the other numbers


class Context(NamedTuple):
    """What a draft may look at.

    Attributes:
        history: int32 [B, S], the prompt and the new tokens of each row.
        known: int32 [B], how many of them there are.
        first: int32 [B], the position in the target's cache of the first token to be guessed.
        policy: how the target's tokens are chosen.
    """

    history: jax.Array
    known: jax.Array
    first: jax.Array
    policy: Policy


@struct.dataclass
class Proposal:
    """Guesses of the next D tokens of every row.

    Attributes:
        tokens: int32 [B, D].
        count: int32 [B], how many of them are guesses; those behind are padding.
        logits: float32 [B, D, V], whose softmax they were drawn from; None where they are a function of the context.
        memory: what the draft wants to see in the next step.
    """

    tokens: jax.Array
    count: jax.Array
    logits: jax.Array | None
    memory: Any


class Draft(Protocol):
    """What speculative decoding calls: a pytree whose `length` D is static."""

    length: int

    def start(self, config: GPT2Config, tokens: jax.Array, lengths: jax.Array, new_tokens: int) -> Any:
        """The memory after prompts [B, T] of `lengths` [B], to which `new_tokens` will be added. Host; checks."""
        ...

    def propose(self, memory: Any, context: Context) -> Proposal:
        """Guesses, in `jit`."""
        ...

    def rollback(self, memory: Any, known: jax.Array) -> Any:
        """The memory of the first `known` tokens, int32 [B], in `jit`."""
        ...


@struct.dataclass
class PromptLookup:
    """Guesses that the text repeats itself (Saxena 2023, "Prompt Lookup Decoding"; LLMA, Yang et al. 2023, 2304.04487).

    The last place where the last `ngram` tokens, or fewer, stood before is looked up; the longest match wins, and the
    tokens that followed there are the guess. Where fewer than `length` followed, they repeat with that period.

    Attributes:
        ngram: so many tokens are matched at most, 1 or more.
        length: guesses per step D. A step then runs D + 1 tokens per row; 8 such columns are cheap on a CPU.
    """

    ngram: int = struct.field(pytree_node=False, default=3)
    length: int = struct.field(pytree_node=False, default=7)

    def start(self, config: GPT2Config, tokens: jax.Array, lengths: jax.Array, new_tokens: int) -> None:
        _check_whole("ngram", self.ngram)
        _check_whole("length", self.length)

    def propose(self, memory: None, context: Context) -> Proposal:
        history, known = context.history, context.known
        place = self._last_match(history, known)  # of the last token of the match
        period = jnp.maximum(known - 1 - place, 1)[:, None]
        steps = jnp.arange(self.length, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(history, place[:, None] + 1 + steps % period, axis=1)
        return Proposal(tokens, jnp.where(place >= 0, self.length, 0), None, None)

    def _last_match(self, history: jax.Array, known: jax.Array) -> jax.Array:
        """int32 [B], where the longest, then newest match of a row's last tokens ends; -1 where there is none."""
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

    def rollback(self, memory: None, known: jax.Array) -> None:
        return None


@struct.dataclass
class DraftModel:
    """Guesses by a smaller model with the same vocabulary (Leviathan et al. 2023, 2211.17192).

    It has a `StaticCache` of its own, which lags one token behind the target's: a step first feeds two tokens, and is
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

    def start(self, config: GPT2Config, tokens: jax.Array, lengths: jax.Array, new_tokens: int) -> StaticCache:
        _check_whole("length", self.length)
        if self.config.vocab_size != config.vocab_size:
            raise DraftError(
                f"draft: expected the model's vocab_size={config.vocab_size}, got {self.config.vocab_size}"
            )
        check_context(self.config, lengths, new_tokens - 1)
        limit = self.config.n_positions
        capacity = bucket(tokens.shape[1] + new_tokens, limit)
        cache = StaticCache.init(self.config, batch_size=tokens.shape[0], capacity=capacity)
        _, cache = prefill_step(self.params, self.config, tokens[:, :limit], lengths, cache, fresh=True)
        return cache.crop(lengths - 1)

    def propose(self, memory: StaticCache, context: Context) -> Proposal:
        policy = context.policy
        random = policy.sampler.needs_key and not self.coupled

        def draw(logits: jax.Array, step: Any) -> tuple[jax.Array, jax.Array | None]:
            keys = jax.vmap(jax.random.fold_in)(policy.keys, context.first + step)
            if not random:
                return policy.sampler(logits, keys), None
            logits = policy.sampler.filtered(logits)
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _DRAWING)
            return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32), logits

        def advance(carry: tuple, step: jax.Array) -> tuple[tuple, tuple]:
            token, cache = carry
            logits, cache = self._feed(token[:, None], cache)
            token, drawn_from = draw(logits, step)
            return (token, cache), (token, drawn_from)

        pair = jnp.stack([context.known - 2, context.known - 1], axis=1)
        logits, cache = self._feed(jnp.take_along_axis(context.history, pair, axis=1), memory)
        head = draw(logits, 0)
        later = jnp.arange(1, self.length, dtype=jnp.int32)
        (_, cache), tail = jax.lax.scan(advance, (head[0], cache), later)
        tokens, logits = jax.tree.map(_joined, head, tail)
        return Proposal(tokens, jnp.full_like(context.known, self.length), logits, cache)

    def _feed(self, tokens: jax.Array, cache: StaticCache) -> tuple[jax.Array, StaticCache]:
        """Logits [B, V] after the last of tokens [B, T], and the cache with all of them."""
        out = run(self.params, self.config, tokens, cache, last=True)
        return out.logits, out.cache

    def rollback(self, memory: StaticCache, known: jax.Array) -> StaticCache:
        return memory.crop(known - 2)


def _joined(first: jax.Array, later: jax.Array) -> jax.Array:
    """[B, D, ...] from the first step's [B, ...] and the later steps' [D - 1, B, ...]."""
    return jnp.concatenate([first[:, None], jnp.moveaxis(later, 0, 1)], axis=1)


def _check_whole(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise DraftError(f"{name}: expected a whole number from 1 up, got {value!r}")
