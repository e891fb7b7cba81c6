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
        mask: int32 [1 or B, ceil(V / 32)]; bit i of word w says whether token 32 w + i is allowed. At least one is
            allowed in every row.
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
        masked = only_allowed(logits, self.mask)
        return _insist(self.sampler(masked, keys), masked)

    def sample(
        self, logits: jax.Array, keys: jax.Array, history: History | None, eos_ids: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
        """Token ids int32 [B], and what the sampler remembers; see `Sampler`."""
        if not hasattr(self.sampler, "sample"):
            return self(logits, keys), memory
        masked = only_allowed(logits, self.mask)
        token, memory = self.sampler.sample(masked, keys, history, eos_ids, memory)
        return _insist(token, masked), memory

    def start(self, batch: int) -> Any:
        """What the sampler remembers at first."""
        return self.sampler.start(batch) if hasattr(self.sampler, "start") else None

    def check_ids(self, vocab_size: int) -> None:
        """Raises SamplerError for a setting that names an id outside the vocabulary; host only."""
        if hasattr(self.sampler, "check_ids"):
            self.sampler.check_ids(vocab_size)

    @property
    def is_plain(self) -> bool:
        """Whether `filtered` says with what probability each token is drawn, whatever came before."""
        return getattr(self.sampler, "is_plain", hasattr(self.sampler, "filtered"))

    def filtered(self, logits: jax.Array) -> jax.Array:
        """Logits [B, V] whose softmax is what tokens are drawn from."""
        return self.sampler.filtered(only_allowed(logits, self.mask))


def only_allowed(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Logits [B, V], minus infinity where a mask int32 [1 or B, ceil(V / 32)] excludes them; None excludes none."""
    return logits if mask is None else jnp.where(unpack_mask(mask, logits.shape[1]), logits, MASKED)


def unpack_mask(mask: jax.Array, vocab_size: int) -> jax.Array:
    """bool [B, V] of packed bits int32 [B, ceil(V / 32)], the lowest first."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab_size] == 1


def _insist(token: jax.Array, masked: jax.Array) -> jax.Array:
    """The tokens int32 [B], and the most likely one where a token is not among the masked logits [B, V]."""
    chosen = jnp.take_along_axis(masked, token[:, None], axis=1)[:, 0]
    return jnp.where(chosen > MASKED, token, jnp.argmax(masked, axis=-1).astype(jnp.int32))
