"""The sampler that takes the most likely token."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Greedy:
    """The most likely token; of equal ones the lowest id."""

    needs_key: bool = struct.field(pytree_node=False, default=False)
    needs_history: bool = struct.field(pytree_node=False, default=False)

    def init(self, batch: int) -> None:
        """It has no state."""

    def sample(
        self, logits: jax.Array, keys: jax.Array, history: None, eos_ids: jax.Array, state: None
    ) -> tuple[jax.Array, None]:
        """Token ids int32 [B]; see `Sampler.sample`."""
        return most_likely(logits), None

    def __repr__(self) -> str:
        return "Greedy()"


def most_likely(logits: jax.Array) -> jax.Array:
    """int32 [B], the id of each row's largest logit, of equal ones the lowest."""
    # As argmax, which takes up to three times as long: XLA's CPU backend does not vectorise it.
    return jax.lax.top_k(logits, 1)[1][..., 0].astype(jnp.int32)
