"""The most likely token and the normalizer of each row of logits, by one native kernel.

XLA needs two operations for them, of which one runs on a single thread; the kernel passes over the logits twice while
they are in the cache. Programs that ask for both get both from one call.
"""

from functools import partial

import jax
import jax.numpy as jnp

from llorch_jax.kernels.calls import call
from llorch_jax.kernels.library import available


def most_likely(logits: jax.Array) -> jax.Array:
    """int32 [B], the id of the largest of each row of logits float32 [B, V], of equal ones the lowest."""
    if not _serves(logits):
        return _plain_most_likely(logits)
    return call(_ids, _plain_most_likely, logits.shape[:-1], jnp.int32, logits)


def logsumexp(logits: jax.Array) -> jax.Array:
    """float32 [B], the logarithm of the sum of the exponentials of each row of logits float32 [B, V]."""
    if not _serves(logits):
        return _plain_logsumexp(logits)
    return call(_totals, _plain_logsumexp, logits.shape[:-1], jnp.float32, logits)


def _plain_most_likely(logits: jax.Array) -> jax.Array:
    # As argmax, which takes up to three times as long: XLA's CPU backend does not vectorise it.
    return jax.lax.top_k(logits, 1)[1][..., 0].astype(jnp.int32)


def _plain_logsumexp(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1)


def _serves(logits: jax.Array) -> bool:
    """Whether there is a kernel for these logits, on a single CPU device or inside `shard_map`."""
    fits = logits.ndim == 2 and logits.size > 0 and logits.shape[1] < 2**31
    return fits and logits.dtype == jnp.float32 and available()


def _summary(which: int, logits: jax.Array) -> jax.Array:
    rows = logits.shape[:1]
    shapes = jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.float32)
    return jax.ffi.ffi_call("llorch_summarize", shapes)(logits)[which]


_ids, _totals = partial(_summary, 0), partial(_summary, 1)
