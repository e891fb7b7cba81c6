"""The sampler that takes the most likely token."""

import jax
from flax import struct

from llorch_jax.kernels.logits import most_likely


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
