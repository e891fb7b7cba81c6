"""What all samplers share: the protocol, what they may know of a row's past, and checks of settings."""

from collections.abc import Callable
from typing import Any, Protocol, Self

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


class Sampler(Protocol):
    """What the decoding loops call.

    A sampler that also has a method `sample(logits, keys, history, eos_ids, memory) -> (ids, memory)` is called by that
    instead: `history` is a `History` where its attribute `needs_history` is true, `eos_ids` int32 [E], and `memory`
    what it returned last, at first that of its method `start(batch)`.
    """

    needs_key: bool

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids int32 [B] from logits float32 [B, V] and keys [B]."""
        ...


def per_row(setting: jax.Array) -> jax.Array:
    """A setting of shape [] or [B] as [1, 1] or [B, 1]."""
    return setting.reshape(-1, 1)


def check(name: str, value: Any, valid: Callable[[np.ndarray], Any], expected: str) -> None:
    """Raises SamplerError unless a setting is one number or one per row, all of them valid."""
    known = np.asarray(value)
    if known.ndim > 1 or known.size == 0 or known.dtype.kind not in "iuf" or not np.all(valid(known)):
        raise SamplerError(f"{name}: expected {expected}, got {value!r}")
