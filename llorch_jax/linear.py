"""Where a weight meets an activation: products with float and quantized matrices, look-ups of rows, layer norm.

Weights are output-major, [out, in], and activations feature-major, [in, M]: see `params`. Every product accumulates
and returns float32, whatever the weights are stored as.

Quantized matrices have one memory layout, written down here because the native kernels rely on it. Every row is cut
into groups of `group_size` columns; group_size None means one group per row. Where the number of columns is no
multiple of the group size, the last group is filled up with zeros, `padding` columns of them, so that
`width = in + padding` is a multiple of it.

| bits | codes | value of an element | scales |
|---|---|---|---|
| 8 | int8 [out, width], row-major; -127 .. 127 | scale * code | [out, groups] |
| 4 | uint8 [out, width / 2], row-major; two codes of 0 .. 15 per byte | scale * (code - 8) | [out, groups] |

With 4 bits, a group takes group_size / 2 consecutive bytes: byte i of the group holds element i in its low nibble and
element i + group_size / 2 in its high nibble. A padded element has the value 0: code 0 with 8 bits, 8 with 4 bits.
Scales are float32 with one group per row, where their bytes do not matter, and float16 with smaller groups, where they
do: 8.5 bits per weight instead of 9 for int8 in groups of 32, and 4.5 instead of 5 for int4. A scale may be negative
or zero. Blocks of GGUF's Q8_0 and Q4_0 are such groups, bit for bit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.cores import usable_cores
from llorch_jax.kernels import matmul as kernels
from llorch_jax.kernels import norms
from llorch_jax.kernels.calls import Function

EXACT = jax.lax.Precision.HIGHEST  # float32 products in full precision on every backend
_BLOCK = 2**18  # elements of a block of rows that is converted at once: 1 MB of float32
_CORES = usable_cores()


@struct.dataclass
class QuantizedMatrix:
    """A matrix [out, in] of 8-bit or 4-bit codes with a scale per row, or per group of a row's columns.

    Attributes:
        codes: int8 [out, width], or uint8 [out, width / 2]; the module's page says how they are packed.
        scales: float32 [out, 1], or float16 [out, groups].
        bits: per code, 8 or 4; static.
        group_size: columns per scale, or None for one scale per row; static.
        padding: columns by which `width` exceeds `in`; static.
        x_bits: how each column that the matrix is multiplied with is rounded, relative to its largest magnitude: to 8
            bits; or, with 16, by kernels to that many and otherwise not at all; static.
    """

    codes: jax.Array
    scales: jax.Array
    bits: int = struct.field(pytree_node=False)
    group_size: int | None = struct.field(pytree_node=False)
    padding: int = struct.field(pytree_node=False, default=0)
    x_bits: int = struct.field(pytree_node=False, default=16)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that this stands for."""
        rows, stored = self.codes.shape
        return rows, stored * 8 // self.bits - self.padding

    def dequantize(self) -> jax.Array:
        """The matrix that this stands for, float32 [out, in]: each element is rounded once, as scale * code."""
        rows, groups = self.scales.shape
        halves = [half.reshape(rows, groups, -1) for half in self.halves()]
        return jnp.concatenate(halves, axis=2).reshape(rows, -1)[:, : self.shape[1]]

    def halves(self) -> list[jax.Array]:
        """The values float32 [out, width], or with 4 bits two of [out, width / 2]: of low nibbles and of high ones."""
        if self.bits == 8:
            return [self._scaled(self.codes)]
        return [self._scaled((nibbles & 15).astype(jnp.int8) - 8) for nibbles in (self.codes, self.codes >> 4)]

    def _scaled(self, codes: jax.Array) -> jax.Array:
        rows, groups = self.scales.shape
        by_group = codes.astype(jnp.float32).reshape(rows, groups, -1)
        return (by_group * self.scales.astype(jnp.float32)[:, :, None]).reshape(rows, -1)


Matrix = jax.Array | QuantizedMatrix


@struct.dataclass
class Norm:
    """Layer norm: weight and bias, both [D]."""

    weight: jax.Array
    bias: jax.Array


@struct.dataclass
class Dense:
    """Affine map: weight [out, in], bias [out]."""

    weight: Matrix
    bias: jax.Array


def matmul(weight: Matrix, x: jax.Array) -> jax.Array:
    """`weight @ x` in float32: by a native kernel where x has a few columns, and there is one for the weights.

    Args:
        weight: [out, in], in floating point or quantized.
        x: [in, M].

    Returns:
        float32 [out, M].
    """
    if isinstance(weight, QuantizedMatrix):
        form = kernels.Form(weight.bits, weight.group_size, weight.x_bits)
        codes, scales = weight.codes, weight.scales
    else:
        form = kernels.Form(weight.dtype.itemsize * 8, None)
        codes, scales = weight, jnp.zeros((0, 0), jnp.float16)
    if not kernels.serves(form, codes, x):
        return plain_matmul(weight, x)
    return kernels.matmul(form, codes, scales, x, _plain_product(form))


def plain_matmul(weight: Matrix, x: jax.Array) -> jax.Array:
    """`matmul` without native kernels: the twin that they are tested against, and that serves in their place."""
    if isinstance(weight, QuantizedMatrix) and weight.x_bits == 8:
        x = _rounded_columns(x)
    if isinstance(weight, QuantizedMatrix) or weight.dtype != jnp.float32:
        return _product_by_blocks(weight, x)
    return _product(weight, x)


@cache
def _plain_product(form: kernels.Form) -> Function:
    """`plain_matmul` of the arrays that a matrix of this form consists of."""

    def product(codes: jax.Array, scales: jax.Array, x: jax.Array) -> jax.Array:
        if form.bits > 8:
            return plain_matmul(codes, x)
        padding = codes.shape[1] * 8 // form.bits - x.shape[0]
        return plain_matmul(QuantizedMatrix(codes, scales, form.bits, form.group_size, padding, form.x_bits), x)

    return product


@jax.custom_jvp
def _rounded_columns(x: jax.Array) -> jax.Array:
    """Each column of x [in, M] rounded to -127 .. 127 times its largest magnitude / 127.

    Its derivative is that of x: the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).
    """
    largest = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    inverse = jnp.where(largest < 1e-30, 0, 127 / largest)
    return jnp.round(x * inverse) * (largest / 127)


@_rounded_columns.defjvp
def _rounded_columns_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _rounded_columns(*primals), tangents[0]


def take_rows(weight: Matrix, ids: jax.Array) -> jax.Array:
    """Rows of a matrix.

    Args:
        weight: [out, in], in floating point or quantized.
        ids: integers of any shape; one outside the matrix takes the nearest row.

    Returns:
        float32 [*ids.shape, in].
    """
    flat = ids.reshape(-1)
    if isinstance(weight, QuantizedMatrix):
        codes = weight.codes.at[flat].get(mode="clip")
        scales = weight.scales.at[flat].get(mode="clip")
        rows = dataclasses.replace(weight, codes=codes, scales=scales).dequantize()
    else:
        rows = weight.at[flat].get(mode="clip").astype(jnp.float32)
    return rows.reshape(*ids.shape, weight.shape[1])


@jax.named_scope("dense")
def dense(params: Dense, x: jax.Array, over: str | None = None) -> jax.Array:
    """`weight @ x + bias` on x [in, M]: float32 [out, M].

    With `over`, the name of a mesh axis inside `shard_map`, each device has some columns of the weight and the rows of
    x that belong to them, and the products are added up over the devices.
    """
    product = matmul(params.weight, x)
    if over is not None:
        product = jax.lax.psum(product, over)
    return product + params.bias.astype(jnp.float32)[:, None]


@jax.named_scope("norm")
def layer_norm(params: Norm, x: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm (Ba et al. 2016) of each column of x [D, M], with the biased variance."""
    weight = params.weight.astype(jnp.float32)
    bias = params.bias.astype(jnp.float32)
    if norms.serves(x):
        return norms.layer_norm(weight, bias, x, epsilon, _plain_layer_norm(epsilon))
    return _plain_layer_norm(epsilon)(weight, bias, x)


@cache
def _plain_layer_norm(epsilon: float) -> Function:
    """`layer_norm` without a native kernel, of weight [D], bias [D] and x [D, M]."""

    def norm(weight: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
        centred = x - jnp.mean(x, axis=0, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=0, keepdims=True)
        return centred * jax.lax.rsqrt(variance + epsilon) * weight[:, None] + bias[:, None]

    return norm


def _product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`matmul` of a float32 matrix.

    XLA's CPU backend cuts a single matrix-vector product into pieces that do not divide evenly among the cores; as a
    batch of products of equal size it takes up to a quarter less time.
    """
    rows, columns = weight.shape
    if x.shape[1] > 1 or rows % _CORES:
        return jnp.matmul(weight, x, precision=EXACT)
    vectors = jnp.broadcast_to(x[:, 0], (_CORES, columns))
    pieces = weight.reshape(_CORES, rows // _CORES, columns)
    return jnp.einsum("PRK,PK->PR", pieces, vectors, precision=EXACT).reshape(rows, 1)


def _product_by_blocks(weight: Matrix, x: jax.Array) -> jax.Array:
    """`matmul` of a matrix that is not float32: blocks of rows are converted and multiplied, one after the other.

    XLA's CPU backend would convert element by element inside the product, ten times slower than float32, or write the
    whole matrix out in float32. A block stays in the cores' caches, which makes this about as fast as float32.
    """
    rows, columns = weight.shape
    step = max(_BLOCK // columns, 1)
    parts, values_of = _convertible(weight)
    inputs = _halves_of_inputs(weight, x)

    def product(block: Sequence[jax.Array]) -> jax.Array:
        products = [jnp.matmul(v, part, precision=EXACT) for v, part in zip(values_of(block), inputs, strict=True)]
        return sum(products[1:], products[0])

    if rows <= step:
        return product(parts)

    def put_block(i: jax.Array, out: jax.Array) -> jax.Array:
        # The last block starts early enough to be whole: some rows are then computed twice, alike.
        start = jnp.minimum(i * step, rows - step)
        block = [jax.lax.dynamic_slice_in_dim(part, start, step) for part in parts]
        return jax.lax.dynamic_update_slice(out, product(block), (start, 0))

    return jax.lax.fori_loop(0, -(-rows // step), put_block, jnp.zeros((rows, x.shape[1]), jnp.float32))


def _convertible(weight: Matrix) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], list[jax.Array]]]:
    """Arrays that rows can be cut out of, and what makes float32 values of such rows."""
    if isinstance(weight, QuantizedMatrix):
        form = weight
        return [form.codes, form.scales], lambda p: dataclasses.replace(form, codes=p[0], scales=p[1]).halves()
    if weight.dtype != jnp.bfloat16:
        return [weight], lambda p: [p[0].astype(jnp.float32)]
    # Of bfloat16 only the bits are cut: XLA would convert the whole array for each slice.
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint16)
    return [bits], lambda p: [jax.lax.bitcast_convert_type(p[0].astype(jnp.uint32) << 16, jnp.float32)]


def _halves_of_inputs(weight: Matrix, x: jax.Array) -> list[jax.Array]:
    """The rows of x [in, M] that belong to each of the values of `QuantizedMatrix.halves`."""
    if not isinstance(weight, QuantizedMatrix):
        return [x]
    padded = jnp.pad(x, ((0, weight.padding), (0, 0)))
    if weight.bits == 8:
        return [padded]
    by_group = padded.reshape(weight.scales.shape[1], 2, -1, x.shape[1])
    return [by_group[:, half].reshape(-1, x.shape[1]) for half in (0, 1)]
