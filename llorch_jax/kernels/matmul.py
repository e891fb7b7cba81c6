"""Products of a matrix, stored as floating-point numbers or as codes, and columns, by native kernels.

One kernel reads every weight once for up to MAX_COLUMNS columns. Another is bound by arithmetic, and multiplies more
columns by any weights but float32 ones, for which XLA is as fast. Both run on the threads of XLA's own pool; see
docs/kernels.md. A column's result has the same bits whatever the other columns contain and however many threads there
are. If the weights are codes, each column of x is rounded to 16 bits relative to its largest magnitude, except by the
second kernel with groups, which computes in float32: the error's norm is at most sqrt(in) / 113,000 of the column's,
and usually about ten times smaller. A column that contains an infinity or a NaN then gives NaN. Where a matrix asks for
columns of 8 bits, both kernels add up integers and scale the sum once, so that they give the same bits.

`linear` documents how codes and scales are laid out in memory. It also has the twins: the same products in jnp, which
are used where the kernels are not, and for derivatives and `vmap`.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.kernels.calls import Function, call
from llorch_jax.kernels.library import available

MAX_COLUMNS = 16
_FLOATS = ("float32", "bfloat16", "float16")
_STEP = 128  # the kernel's workspace is padded to a multiple of this many columns of the weights
_PACKED = 32  # with many columns of x, it has room for a multiple of this many
_MIN_ROWS = 48  # of the weights, if x has many columns
_MAX_EXACT = 65536  # columns of the weights whose products of 8-bit codes 32 bits can add up


class Form(NamedTuple):
    """How the elements of a matrix are stored.

    Attributes:
        bits: bits per element: 32 or 16 for floating point, 8 or 4 for codes.
        group_size: columns per scale; None for one scale per row, or none at all.
        x_bits: bits that an element of x is rounded to if the matrix has codes: 16, if there is a kernel, or 8.
    """

    bits: int
    group_size: int | None
    x_bits: int = 16


def serves(form: Form, weight: jax.Array, x: jax.Array) -> bool:
    """Whether `matmul` supports this product, on a single CPU device or inside `shard_map`.

    Args:
        form: how the matrix is stored.
        weight: the elements or codes, [out, ...].
        x: [in, M].
    """
    rows, (depth, columns) = weight.shape[0], x.shape
    few = 1 <= columns <= MAX_COLUMNS and rows > 0
    many = columns > MAX_COLUMNS and rows >= _MIN_ROWS and form.bits < 32
    fits = (few or many) and depth > 0 and x.dtype == jnp.float32
    return fits and _has_kernel(form, weight) and available()


def _has_kernel(form: Form, weight: jax.Array) -> bool:
    if form.bits > 8:
        return str(weight.dtype) in _FLOATS
    if form.x_bits == 8:
        return form.bits == 8 and form.group_size is None and weight.shape[1] <= _MAX_EXACT
    if form.group_size is None:
        return form.bits == 8
    return form.group_size == 32 or (form.group_size % 64 == 0 and form.group_size <= 1024)


def matmul(form: Form, weight: jax.Array, scales: jax.Array, x: jax.Array, twin: Function) -> jax.Array:
    """The product of a matrix and a few columns.

    Args:
        form: how the matrix is stored; `serves` tells whether there is a kernel for it.
        weight: float32, bfloat16 or float16 [out, in]; int8 [out, width]; or uint8 [out, width / 2].
        scales: float32 [out, 1], or float16 [out, groups]; float16 [0, 0] if the matrix has none.
        x: float32 [in, M], in <= width.
        twin: the same product in jnp, of weight, scales and x; hashable.

    Returns:
        float32 [out, M].
    """
    shape = weight.shape[0], x.shape[1]
    return call(_native(form), twin, shape, jnp.float32, weight, scales, x)


@cache
def _native(form: Form) -> Function:
    return partial(_call, form)


def _call(form: Form, weight: jax.Array, scales: jax.Array, x: jax.Array) -> jax.Array:
    columns = x.shape[1]
    width = weight.shape[1] * 2 if form.bits == 4 else weight.shape[1]
    if columns > MAX_COLUMNS:
        floats = -(-columns // _PACKED) * _PACKED * (width + 2)
    else:
        floats = columns * (-(-width // _STEP) * _STEP + 1)
    y = jax.ShapeDtypeStruct((weight.shape[0], columns), jnp.float32)
    workspace = jax.ShapeDtypeStruct((4 * floats,), jnp.uint8)
    call = jax.ffi.ffi_call("llorch_matmul", (y, workspace))
    attributes = {"bits": form.bits, "group": form.group_size or 0, "x_bits": form.x_bits}
    return call(weight, scales, x, **{name: np.int64(value) for name, value in attributes.items()})[0]
