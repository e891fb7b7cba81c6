"""Sampling from a subset of the tokens, given as a bit mask."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.errors import SamplerError
from llorch_jax.sampling.base import MASKED, ChecksIds, History, KnowsProbabilities, Sampler


@struct.dataclass
class Masked:
    """Another sampler, restricted to allowed tokens.

    The mask is applied to the logits before the sampler does anything with them, as in vLLM.

    Attributes:
        sampler: the other one.
        mask: int32 [1 or B, ceil(V / 32)]; bit i of word w says whether token 32 w + i is allowed. At least one is
            allowed in every row.
        insists: bool, or bool [B] by rows: whether the most likely allowed token is taken where the sampler's settings
            exclude all that is allowed, as a constraint wants it; if not, none is chosen (-1).
    """

    sampler: Sampler
    mask: Any
    insists: Any = True

    @property
    def needs_key(self) -> bool:
        """Whether it draws."""
        return self.sampler.needs_key

    @property
    def needs_history(self) -> bool:
        """Whether it must see the tokens so far."""
        return self.sampler.needs_history

    def init(self, batch: int) -> Any:
        """The other sampler's state."""
        return self.sampler.init(batch)

    def sample(
        self, logits: jax.Array, keys: jax.Array, history: History | None, eos_ids: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """Token ids int32 [B], and the other sampler's state; see `Sampler.sample`."""
        masked = only_allowed(logits, self.mask)
        token, state = self.sampler.sample(masked, keys, history, eos_ids, state)
        chosen = jnp.take_along_axis(masked, jnp.maximum(token, 0)[:, None], axis=1)[:, 0]
        other = jnp.where(self.insists, jnp.argmax(masked, axis=-1).astype(jnp.int32), -1)
        return jnp.where((token >= 0) & (chosen != MASKED), token, other), state  # kept if NaN, for `check_chosen`

    def check_ids(self, vocab_size: int) -> None:
        """Raises SamplerError for a setting that names an id outside the vocabulary; host only."""
        if isinstance(self.sampler, ChecksIds):
            self.sampler.check_ids(vocab_size)

    @property
    def is_plain(self) -> bool:
        """Whether `filtered` says with what probability each token is drawn, whatever came before."""
        return isinstance(self.sampler, KnowsProbabilities) and self.sampler.is_plain

    def filtered(self, logits: jax.Array) -> jax.Array:
        """Logits [B, V] whose softmax is what tokens are drawn from."""
        if not isinstance(self.sampler, KnowsProbabilities):
            raise SamplerError(f"sampler: expected one with `filtered`, got a {type(self.sampler).__name__}")
        return self.sampler.filtered(only_allowed(logits, self.mask))


def only_allowed(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Logits [B, V], minus infinity where a mask int32 [1 or B, ceil(V / 32)] excludes them; None excludes none."""
    return logits if mask is None else jnp.where(unpack_mask(mask, logits.shape[1]), logits, MASKED)


def unpack_mask(mask: jax.Array, vocab_size: int) -> jax.Array:
    """bool [B, V] of packed bits int32 [B, ceil(V / 32)], the lowest first."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab_size] == 1
