"""From logits to token ids: samplers are pytrees whose settings are traced, so that changing one compiles nothing.

A sampler is called as `sampler(logits, keys)` with logits float32 [B, V] and one key per row, and returns int32 [B].
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.errors import LlorchError

MASKED = -jnp.inf
_CANDIDATE_BUCKETS = (64, 256, 1024)
_COLDEST = 1e-30  # below, logits divided by the temperature could overflow float32
_MOST = np.iinfo(np.int32).max


class SamplerError(LlorchError):
    """A sampling setting is impossible; the message names it."""


class Sampler(Protocol):
    """What the decoding loops call."""

    needs_key: bool

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids int32 [B] from logits float32 [B, V] and keys [B]."""
        ...


@struct.dataclass
class Greedy:
    """The most likely token; of equal ones the lowest id."""

    needs_key: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@struct.dataclass
class Sampling:
    """A random token after temperature, top-k and top-p, in this order; make one with `Sampling.create`.

    Attributes:
        temperature: float32 [] or [B].
        top_k: int32 [] or [B]; None keeps all tokens.
        top_p: float32 [] or [B]; None keeps all tokens.
        candidates: a bound of top_k; only so many largest logits are sorted.
    """

    temperature: jax.Array
    top_k: jax.Array | None
    top_p: jax.Array | None
    candidates: int | None = struct.field(pytree_node=False)
    needs_key: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def create(cls, temperature: Any = 1.0, top_k: Any = None, top_p: Any = None) -> "Sampling":
        """A sampler with settings for all rows (scalars) or per row (sequences of length B).

        Args:
            temperature: logits are divided by it; 1e-30 or more.
            top_k: how many of the most likely tokens are kept, 1 or more (Fan et al. 2018, section 5.4).
            top_p: the most likely tokens whose probabilities reach this sum are kept; more than 0, at most 1
                (Holtzman et al. 2020, section 3.1).

        Raises:
            SamplerError: a setting is out of range.
        """
        warm = "finite numbers from 1e-30 up (use Greedy() for the most likely token)"
        _check("temperature", temperature, lambda x: (x >= _COLDEST) & np.isfinite(x), warm)
        if top_k is not None:
            _check("top_k", top_k, lambda x: (x >= 1) & (x == np.floor(x)), "whole numbers from 1 up")
        if top_p is not None:
            _check("top_p", top_p, lambda x: (x > 0) & (x <= 1), "numbers above 0 and up to 1")
        bound = None if top_k is None else int(np.max(top_k))
        return cls(
            temperature=jnp.asarray(temperature, jnp.float32),
            top_k=None if top_k is None else jnp.asarray(np.minimum(top_k, _MOST), jnp.int32),
            top_p=None if top_p is None else jnp.asarray(top_p, jnp.float32),
            candidates=None if bound is None else next((b for b in _CANDIDATE_BUCKETS if b >= bound), None),
        )

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        self._check_rows(logits.shape[0])
        scaled = apply_temperature(logits, self.temperature)
        if self.top_k is None and self.top_p is None:
            return _draw(scaled, keys)
        count = min(self.candidates or scaled.shape[-1], scaled.shape[-1])
        values, ids = jax.lax.top_k(scaled, count)
        kept = _keep_sorted(values, self.top_k, self.top_p)
        choice = _draw(jnp.where(kept, values, MASKED), keys)
        return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]

    def filtered(self, logits: jax.Array) -> jax.Array:
        """Logits [B, V] whose softmax is what tokens are drawn from: minus infinity where a token never is."""
        self._check_rows(logits.shape[0])
        scaled = apply_temperature(logits, self.temperature)
        if self.top_k is None and self.top_p is None:
            return scaled
        return _mask_unsorted(scaled, self.top_k, self.top_p, self.candidates)

    def _check_rows(self, batch: int) -> None:
        for name in ("temperature", "top_k", "top_p"):
            setting = getattr(self, name)
            if setting is not None and setting.shape not in ((), (1,), (batch,)):
                raise SamplerError(f"{name}: expected one value or {batch}, one per row, got {setting.shape[0]}")


def apply_temperature(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits [B, V] divided by temperature, [] or [B]."""
    return logits / _per_row(temperature)


def apply_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Logits [B, V] with all but each row's `top_k` largest, int32 [] or [B], at minus infinity."""
    return _mask_unsorted(logits, top_k, None)


def apply_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B, V] with all but the most likely tokens that reach the probability `top_p` at minus infinity."""
    return _mask_unsorted(logits, None, top_p)


def _mask_unsorted(
    logits: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None, candidates: int | None = None
) -> jax.Array:
    values, ids = jax.lax.top_k(logits, min(candidates or logits.shape[-1], logits.shape[-1]))
    masked = jnp.where(_keep_sorted(values, top_k, top_p), values, MASKED)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.full_like(logits, MASKED).at[rows, ids].set(masked)


def _keep_sorted(values: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None) -> jax.Array:
    """Which of the logits [B, C], sorted downwards, are kept: bool [B, C]. The first always is."""
    rank = jnp.arange(values.shape[-1], dtype=jnp.int32)[None]
    kept = jnp.ones(values.shape, bool) if top_k is None else rank < jnp.broadcast_to(_per_row(top_k), values.shape)
    if top_p is None:
        return kept
    probabilities = jax.nn.softmax(jnp.where(kept, values, MASKED), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    limit = jnp.where(top_p < 1, top_p, jnp.inf)  # sums of many probabilities may round to 1 before the last
    return (kept & (before < _per_row(limit))) | (rank == 0)


def _draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One index per row, int32 [B], in proportion to exp(logits)."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _per_row(setting: jax.Array) -> jax.Array:
    """A setting of shape [] or [B] as [1, 1] or [B, 1]."""
    return setting.reshape(-1, 1)


def _check(name: str, value: Any, valid: Any, expected: str) -> None:
    known = np.asarray(value)
    if known.ndim > 1 or known.size == 0 or known.dtype.kind not in "iuf" or not np.all(valid(known)):
        raise SamplerError(f"{name}: expected {expected}, got {value!r}")
