"""Sampling from some of the tokens only, named by a bit for each."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.sampling.base import MASKED, History


@struct.dataclass
class Masked:
    """Another sampler, of which only allowed tokens come.

    The mask is applied to the logits before anything that the sampler does with them, as vLLM does. Where the sampler's
    settings exclude all that is allowed, the most likely allowed token is taken.

    Attributes:
        sampler: any `Sampler`.
        mask: int32 [B, ceil(V / 32)]; bit i of word w says whether token 32 w + i is allowed, at least one per row.
    """

    sampler: Any
    mask: Any

    @property
    def needs_key(self) -> bool:
        """Whether it draws."""
        return self.sampler.needs_key

    @property
    def needs_history(self) -> bool:
        """Whether it must see the tokens so far."""
        return getattr(self.sampler, "needs_history", False)

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        allowed = unpack_mask(self.mask, logits.shape[1])
        masked = jnp.where(allowed, logits, MASKED)
        return _insist(self.sampler(masked, keys), masked, allowed)

    def sample(
        self, logits: jax.Array, keys: jax.Array, history: History | None, eos_ids: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
        """Token ids int32 [B], and what the sampler remembers; see `Sampler`."""
        if not hasattr(self.sampler, "sample"):
            return self(logits, keys), memory
        allowed = unpack_mask(self.mask, logits.shape[1])
        masked = jnp.where(allowed, logits, MASKED)
        token, memory = self.sampler.sample(masked, keys, history, eos_ids, memory)
        return _insist(token, masked, allowed), memory


def unpack_mask(mask: jax.Array, vocab_size: int) -> jax.Array:
    """bool [B, V] of packed bits int32 [B, ceil(V / 32)], the lowest first."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab_size] == 1


def _insist(token: jax.Array, masked: jax.Array, allowed: jax.Array) -> jax.Array:
    kept = jnp.take_along_axis(allowed, token[:, None], axis=1)[:, 0]
    return jnp.where(kept, token, jnp.argmax(masked, axis=-1).astype(jnp.int32))
