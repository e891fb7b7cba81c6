"""Writing new tokens into a cache's arrays by a native kernel, in place if XLA can give it the array.

XLA needs several operations for each row, or for each token written to a page, and two transposes.
"""

from collections.abc import Callable
from functools import cache

import jax

from llorch_jax.kernels.calls import Function, call
from llorch_jax.kernels.library import available

Places = Callable[..., tuple[jax.Array, jax.Array]]


@cache
def _native(places: Function) -> Function:
    def write_natively(array: jax.Array, tokens: jax.Array, *where: jax.Array) -> jax.Array:
        target = jax.ffi.ffi_call(
            "llorch_write", jax.ShapeDtypeStruct(array.shape, array.dtype), input_output_aliases={0: 0}
        )
        rows, slots = places(tokens, *where)
        return target(array, tokens, rows, slots)

    return write_natively


def write(places: Places, twin: Function, array: jax.Array, tokens: jax.Array, *where: jax.Array) -> jax.Array:
    """The array with new tokens in some of its slots; of several for the same slot, the last one remains.

    Args:
        places: for `tokens` and `where`, two arrays int32 [B, T]: the index along R and the slot of each token. Tokens
            whose place is outside the array are dropped. Hashable.
        twin: the same in jnp, of `array`, `tokens` and `where`; hashable. It is used where there is no kernel.
        array: [R, K, S, X].
        tokens: [B, T, K, X], of the same dtype.
        where: arrays that say where the tokens belong.
    """
    if array.size == 0 or tokens.size == 0 or not available():
        return twin(array, tokens, *where)
    return call(_native(places), twin, array.shape, array.dtype, array, tokens, *where)
