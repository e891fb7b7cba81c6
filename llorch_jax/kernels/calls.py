"""How a kernel is called inside a jitted program, and when its twin takes its place.

A kernel's function and its twin compute the same from the same arrays. The twin, in jnp, is used for derivatives and
`vmap`, and in exported programs, which may run where there is no kernel.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.interpreters import mlir

Function = Callable[..., jax.Array]  # of arrays; hashable, so that it can be static in `jit`
Shape = tuple[int, ...]


def call(native: Function, twin: Function, shape: Shape, dtype: Any, *arrays: jax.Array) -> jax.Array:
    """`native(*arrays)`, or `twin(*arrays)` where there may be no kernel.

    Args:
        native: calls a kernel.
        twin: computes the same in jnp.
        shape: shape of the result.
        dtype: dtype of the result.
        arrays: the arguments of both.
    """
    return _call(native, twin, jax.ShapeDtypeStruct(shape, dtype), *arrays)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _call(native: Function, twin: Function, out: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
    return _batchable(native, twin, out)(*arrays)


@_call.defjvp
def _call_jvp(
    native: Function, twin: Function, out: jax.ShapeDtypeStruct, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    """The kernel's value and the twin's derivative."""
    _, tangent = jax.jvp(twin, primals, tangents)
    return _call(native, twin, out, *primals), tangent


@cache
def _batchable(native: Function, twin: Function, out: jax.ShapeDtypeStruct) -> Any:
    """The kernel as a function that `vmap` replaces with the twin."""
    bind = jax.jit(partial(_native_p.bind, native=native, twin=twin, out=out))
    function = jax.custom_batching.custom_vmap(bind)

    @function.def_vmap
    def batch(axis_size: int, in_batched: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        axes = tuple(0 if batched else None for batched in in_batched)
        return jax.vmap(twin, in_axes=axes, axis_size=axis_size)(*arrays), True

    return function


_native_p = jax.extend.core.Primitive("llorch_native")


@_native_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _shape(*arrays: Any, native: Function, twin: Function, out: jax.ShapeDtypeStruct) -> Any:
    return jax.core.ShapedArray(out.shape, np.dtype(out.dtype))


def _lower(ctx: Any, *arrays: Any, native: Function, twin: Function, out: jax.ShapeDtypeStruct) -> Any:
    exported = ctx.module_context.lowering_parameters.for_export
    return mlir.lower_fun(twin if exported else native, multiple_results=False)(ctx, *arrays)


mlir.register_lowering(_native_p, _lower)
