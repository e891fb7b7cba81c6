"""Mirostat: a sampler that steers the surprise of the text towards a target."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.sampling import truncation
from llorch_jax.sampling.base import MASKED, check
from llorch_jax.sampling.drawing import draw


@struct.dataclass
class Mirostat:
    """Keeps the surprise of the text near a target (Basu et al. 2021, 2007.14966; version 2 as in llama.cpp).

    Tokens whose surprise in bits is above mu are cut off, one of the others is drawn, and mu moves against the error of
    its surprise. Each row has its own mu, initially twice the target. Make one with `Mirostat.create`.

    Attributes:
        tau: target surprise in bits, float32 [] or [B].
        eta: learning rate of mu, float32 [] or [B].
        temperature: float32 [] or [B].
    """

    tau: jax.Array
    eta: jax.Array
    temperature: jax.Array
    needs_key: bool = struct.field(pytree_node=False, default=True)
    needs_history: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, tau: Any = 5.0, eta: Any = 0.1, temperature: Any = 1.0) -> "Mirostat":
        """A sampler with settings for all rows (scalars) or per row (sequences of length B).

        Raises:
            SamplerError: a setting is not above 0.
        """
        for name, value in (("tau", tau), ("eta", eta), ("temperature", temperature)):
            check(name, value, lambda x: (x > 0) & np.isfinite(x), "finite numbers above 0")
        rate, warmth = jnp.asarray(eta, jnp.float32), jnp.asarray(temperature, jnp.float32)
        return cls(jnp.asarray(tau, jnp.float32), rate, warmth)

    def __repr__(self) -> str:
        return "Mirostat(tau, eta, temperature)"

    def init(self, batch: int) -> jax.Array:
        """mu float32 [B]."""
        return jnp.broadcast_to(2 * self.tau, (batch,))

    def sample(
        self, logits: jax.Array, keys: jax.Array, history: None, eos_ids: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Token ids int32 [B], and mu for the next step; see `Sampler.sample`."""
        logits = truncation.apply_temperature(logits, self.temperature)
        surprise = -jax.nn.log_softmax(logits, axis=-1) / jnp.log(2.0)
        kept = (surprise <= state[:, None]) | (logits == jnp.max(logits, axis=-1, keepdims=True))
        left = jnp.where(kept, logits, MASKED)
        token = draw(left, keys)
        chosen = jnp.take_along_axis(left, token[:, None], axis=1)[:, 0]
        observed = (jax.nn.logsumexp(left, axis=-1) - chosen) / jnp.log(2.0)
        return token, state - self.eta * (observed - self.tau)
