"""Layer norm by a native kernel: one call, where XLA needs four operations that take longer to start than to run."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.kernels.calls import Function, call
from llorch_jax.kernels.library import available


def serves(x: jax.Array) -> bool:
    """Whether `layer_norm` supports columns x [D, M], on a single CPU device or inside `shard_map`."""
    return x.size > 0 and x.dtype == jnp.float32 and available()


def layer_norm(weight: jax.Array, bias: jax.Array, x: jax.Array, epsilon: float, twin: Function) -> jax.Array:
    """Layer norm of each column; a column's result has the same bits whatever the other columns are.

    Args:
        weight: float32 [D].
        bias: float32 [D].
        x: float32 [D, M].
        epsilon: is added to the variance.
        twin: the same of weight, bias and x in jnp, hashable.
    """
    return call(_native(epsilon), twin, x.shape, x.dtype, weight, bias, x)


@cache
def _native(epsilon: float) -> Function:
    return partial(_layer_norm, epsilon)


def _layer_norm(epsilon: float, weight: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
    target = jax.ffi.ffi_call("llorch_layer_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return target(x, weight, bias, epsilon=np.float32(epsilon))
