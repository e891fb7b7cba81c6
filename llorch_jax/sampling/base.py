"""What all samplers share: the protocol, what they may know of a row's past, and checks of settings."""

from collections.abc import Callable
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.errors import SamplerError

MASKED = -jnp.inf


@struct.dataclass
class History:
    """The tokens of each row so far.

    Attributes:
        tokens: int32 [B, S], padded on the right.
        lengths: int32 [B], prompt and generated tokens.
        prompts: int32 [B], how many of them are the prompt.
    """

    tokens: jax.Array
    lengths: jax.Array
    prompts: jax.Array

    @classmethod
    def of(cls, prompts: jax.Array, lengths: jax.Array, capacity: int) -> Self:
        """A history of prompts int32 [B, T] with `lengths` int32 [B], with room for `capacity` tokens per row."""
        tokens = jnp.pad(prompts, ((0, 0), (0, max(0, capacity - prompts.shape[1]))))
        return cls(tokens, lengths, jnp.array(lengths))

    def __repr__(self) -> str:
        return f"History({self.tokens.shape[0]} rows, room for {self.tokens.shape[1]} tokens)"

    def append(self, token: jax.Array, count: jax.Array) -> Self:
        """With one token int32 [B] more in the rows where `count` int32 [B] is 1; what has no room is dropped."""
        rows = jnp.arange(token.shape[0])
        slots = jnp.where(count > 0, self.lengths, self.tokens.shape[1])
        tokens = self.tokens.at[rows, slots].set(token, mode="drop")
        return self.replace(tokens=tokens, lengths=self.lengths + count)  # type: ignore[attr-defined]

    @property
    def filled(self) -> jax.Array:
        """bool [B, S], where there is a token."""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None] < self.lengths[:, None]

    @property
    def generated(self) -> jax.Array:
        """int32 [B], how many tokens have been generated."""
        return self.lengths - self.prompts


@runtime_checkable
class Sampler(Protocol):
    """What the decoding loops call: any pytree with these four members, such as a `flax.struct.dataclass`.

    Settings that are arrays are traced, so that other values compile nothing. See docs/sampling.md for an example.
    """

    @property
    def needs_key(self) -> bool:
        """Whether it draws. If not, callers need not give a key."""
        ...

    @property
    def needs_history(self) -> bool:
        """Whether it must see the tokens so far."""
        ...

    def init(self, batch: int) -> Any:
        """The state before the first token: a pytree of arrays whose first axis is the batch, or None."""
        ...

    def sample(
        self, logits: jax.Array, keys: jax.Array, history: Any, eos_ids: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """Chooses the next token of every row; called in `jit`.

        Args:
            logits: float32 [B, V].
            keys: [B], a random key for each row and position.
            history: `History` of the rows; None where `needs_history` is false.
            eos_ids: int32 [B, E], ids that end a row, filled up with -1; E may be 0.
            state: what `init` or the last call returned.

        Returns:
            Token ids int32 [B], -1 in a row that no token is allowed in, which decoding reports as a SamplerError; and
            the state for the next step.
        """
        ...


@runtime_checkable
class ChecksIds(Protocol):
    """A sampler whose settings name token ids, which must be in the vocabulary."""

    def check_ids(self, vocab_size: int) -> None:
        """Raises SamplerError for an id outside the vocabulary; host only."""
        ...


@runtime_checkable
class KnowsProbabilities(Protocol):
    """A sampler that can tell with what probability it draws each token, as rejection sampling needs."""

    @property
    def is_plain(self) -> bool:
        """Whether `filtered` says all about its draws, whatever came before."""
        ...

    def filtered(self, logits: jax.Array) -> jax.Array:
        """Logits float32 [B, V] whose softmax tokens are drawn from, minus infinity where a token never is."""
        ...


def check_sampler(sampler: Any, vocab_size: int | None = None) -> None:
    """Raises SamplerError for what is not a sampler, or names ids outside a vocabulary of this size. Host only."""
    if isinstance(sampler, type) or not isinstance(sampler, Sampler):
        raise SamplerError(
            "sampler: expected an object with needs_key, needs_history, init and sample, such as lj.Greedy(), "
            f"got {sampler if isinstance(sampler, type) else type(sampler)}"
        )
    if vocab_size is not None and isinstance(sampler, ChecksIds):
        sampler.check_ids(vocab_size)


def per_row(setting: jax.Array) -> jax.Array:
    """A setting of shape [] or [B] as [1, 1] or [B, 1]."""
    return setting.reshape(-1, 1)


def check(name: str, value: Any, valid: Callable[[np.ndarray], Any], expected: str) -> None:
    """Raises SamplerError unless a setting is one number or one per row, all of them valid and within float32."""
    try:
        known = np.asarray(value)
    except ValueError:  # rows of several lengths
        known = np.asarray("")
    numbers = known.ndim <= 1 and known.size > 0 and known.dtype.kind in "iuf"
    with np.errstate(all="ignore"):
        if not numbers or not np.all(valid(known)) or not np.all(np.isfinite(known.astype(np.float32))):
            raise SamplerError(f"{name}: expected {expected}, got {value!r:.80}")
