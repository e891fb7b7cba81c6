"""Weights in low precision: which formats there are, and how a matrix is rounded to one.

int8: a group's scale is its largest magnitude times float32's 1 / 127, rounded to the dtype of scales; a code is the
element / scale, rounded half to even and clipped to -127 .. 127.

int4: a group's scale is the best of several, by the sum of squared errors: its element of largest magnitude, negated,
divided by each of `DIVISORS` and rounded to float16, the first of equal ones; a code is 8 + the element / scale,
rounded half to even and clipped to 0 .. 15. A scale alone was chosen, and no offset with it: in groups of 32 it takes
4.5 bits per weight instead of 5, and the error is that of an offset in groups of 64 at the same 4.5 bits. The token
embedding and the output projection, which every logit depends on, take int8 in groups of the same size instead.

w8a8: the weights of int8 in whole rows. In the blocks, what they are multiplied with, the activations, is rounded to 8
bits too, with one scale per token (the vector-wise quantization of Dettmers et al. 2022, arXiv:2208.07339, without
outliers kept apart). Those of the output projection are not: for a prompt it is applied to one token only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.config import GPT2Config
from llorch_jax.errors import QuantizationError
from llorch_jax.linear import QuantizedMatrix
from llorch_jax.params import Params, param_shapes
from llorch_jax.tracing import is_concrete

DTYPES = {  # name -> NumPy's dtype
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
}
_GROUPS: dict[str, tuple[int | None, ...]] = {  # the default first
    "int8": (None, 32, 64, 128),
    "w8a8": (None,),
    "int4": (32, 64),
}
WEIGHTS = (*DTYPES, *_GROUPS)
DIVISORS = np.arange(6.5, 9.75, 0.25).astype(np.float32)
_BLOCK = 2**20  # elements that are rounded at once while a file is read


class Codes(NamedTuple):
    """How one matrix is quantized: the attributes of `QuantizedMatrix`."""

    bits: int
    group_size: int | None
    x_bits: int = 16


Storage = np.dtype | Codes  # of one array


class WeightFormat(NamedTuple):
    """How the weights of a model are stored.

    Attributes:
        name: one of `WEIGHTS`.
        group_size: columns per scale, or None for one scale per row or no scales.
    """

    name: str
    group_size: int | None

    @classmethod
    def of(cls, name: Any, group_size: int | None = None) -> "WeightFormat":
        """A checked format; a dtype object serves as its name.

        Raises:
            QuantizationError: there is no such format, or no such group size for it.
        """
        if not isinstance(name, str):
            name = getattr(name, "__name__", None) or getattr(name, "name", repr(name))
        if name not in WEIGHTS:
            raise QuantizationError(f"weights: expected one of {', '.join(WEIGHTS)}; got {name!r:.80}")
        groups = _GROUPS.get(name, (None,))
        if group_size is None:
            return cls(name, groups[0])
        if isinstance(group_size, bool) or group_size not in groups:
            known = ", ".join(map(str, groups))
            raise QuantizationError(f"group_size: expected one of {known} for {name} weights, got {group_size!r:.80}")
        return cls(name, int(group_size))

    @property
    def arrays(self) -> "WeightFormat":
        """The format that stores the same arrays and computes with activations as they are."""
        return self._replace(name="int8") if self.name == "w8a8" else self

    def storage(self, path: tuple[Any, ...], leaf: Any) -> Storage | None:
        """How one array is stored, given its path in `Params` and something of its shape; None leaves it as it is."""
        if self.name in DTYPES:
            return DTYPES[self.name]
        field = path[0].name
        if field == "wpe" or len(leaf.shape) != 2:
            return None
        every_logit = field in ("wte", "lm_head")
        bits = 4 if self.name == "int4" and not every_logit else 8
        return Codes(bits, self.group_size, 8 if self.name == "w8a8" and not every_logit else 16)


def quantize(params: Params, weights: str, group_size: int | None = None) -> Params:
    """Parameters whose weights are stored in another format; a pure function of trees.

    int8, w8a8 and int4 apply to every matrix that is multiplied: those of the blocks, the token embedding, which is
    also the output projection if the two are tied, and an untied output projection. With int4, the embedding and the
    output projection take int8. With w8a8, the weights are those of int8, and the matrices of the blocks also round
    what they are multiplied with to 8 bits. Position embeddings, norms and biases stay as they are. A dtype applies to
    every array.

    Args:
        params: in floating point.
        weights: "float32", "bfloat16", "float16", "int8", "w8a8" or "int4".
        group_size: columns that share a scale: None (whole rows), 32, 64 or 128 for int8; 32 (also by None) or 64 for
            int4; only None for the others.

    Returns:
        The parameters in that format. Arrays that it leaves as they are are shared with `params`.

    Raises:
        QuantizationError: there is no such format or group size, the parameters are quantized already, or a value is
            not finite or too large for the format.
    """
    form = WeightFormat.of(weights, group_size)
    check_float(params, "quantize the model's float weights")
    if params.mesh is not None:
        raise QuantizationError("params: expected those of one device, got some on a mesh; quantize first, then shard")

    def stored(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        storage = form.storage(path, leaf)
        if storage is None:
            return leaf
        name = jax.tree_util.keystr(path).lstrip(".")
        if isinstance(storage, Codes):
            return quantize_matrix(leaf, storage, name=name)
        return _cast(leaf, storage, name)

    return jax.tree_util.tree_map_with_path(stored, params)


def quantized_shapes(config: GPT2Config, weights: str, group_size: int | None = None) -> Params:
    """What `quantize` makes of a model's parameters, as `jax.ShapeDtypeStruct`s; nothing is allocated.

    Args:
        config: the model's hyperparameters.
        weights: as for `quantize`.
        group_size: likewise.

    Raises:
        QuantizationError: there is no such format or group size.
    """
    return jax.eval_shape(lambda params: quantize(params, weights, group_size), param_shapes(config))


def check_float(params: Params, advice: str) -> None:
    """Raises QuantizationError where a matrix is quantized."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    for path, leaf in leaves:
        if isinstance(leaf, QuantizedMatrix):
            name = jax.tree_util.keystr(path).lstrip(".")
            raise QuantizationError(f"params: expected floating point, got int{leaf.bits} in {name}; {advice}")


def quantize_matrix(weight: Any, form: Codes, *, name: str = "weight") -> QuantizedMatrix:
    """A matrix rounded to codes and scales.

    Args:
        weight: [out, in], in floating point.
        form: 8 or 4 bits; one scale per row only with 8.
        name: of the matrix, for the error.

    Raises:
        QuantizationError: a value is not finite, or a group's scale exceeds the range of float16.
    """
    matrix, fits = _quantized(weight, form)
    _check_fits(fits, name, f"int{form.bits}")
    return matrix


def quantize_by_rows(
    shape: tuple[int, ...], rows: Callable[[int, int], np.ndarray], form: Codes, *, name: str
) -> QuantizedMatrix:
    """`quantize_matrix` of a matrix that is read some rows at a time, so that it is never whole in memory.

    Args:
        shape: (out, in).
        rows: gives the rows from one number up to another, [count, in].
        form: as for `quantize_matrix`.
        name: likewise.

    Raises:
        QuantizationError: as `quantize_matrix`.
    """
    step = max(_BLOCK // shape[1], 1)
    like: QuantizedMatrix = jax.eval_shape(lambda: _quantized(jnp.zeros(shape), form)[0])
    codes = np.empty(like.codes.shape, like.codes.dtype)
    scales = np.empty(like.scales.shape, like.scales.dtype)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        part = quantize_matrix(jnp.asarray(rows(start, stop)), form, name=name)
        codes[start:stop] = part.codes
        scales[start:stop] = part.scales
    return like.replace(codes=jnp.asarray(codes), scales=jnp.asarray(scales))  # type: ignore[attr-defined]


@partial(jax.jit, static_argnames="form")
def _quantized(weight: jax.Array, form: Codes) -> tuple[QuantizedMatrix, jax.Array]:
    """The quantized matrix, and whether every value is finite and every scale in range."""
    bits, group_size, x_bits = form
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    padding = -columns % size
    padded = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, padding)))
    grouped = padded.reshape(rows, -1, size)
    dtype = jnp.float32 if group_size is None else jnp.float16
    scales = _absmax_scales(grouped, dtype) if bits == 8 else _searched_scales(grouped)
    fits = jnp.all(jnp.isfinite(weight)) & jnp.all(jnp.isfinite(scales))
    if bits == 8:
        codes = _nearest(grouped, scales, -127, 127).astype(jnp.int8).reshape(rows, -1)
    else:
        codes = _packed(_nearest(grouped, scales, -8, 7))
    return QuantizedMatrix(codes, scales, bits, group_size, padding, x_bits), fits


def _absmax_scales(grouped: jax.Array, dtype: Any) -> jax.Array:
    # XLA turns a division by 127 into this product anyway, whose result is another float at times.
    return (jnp.max(jnp.abs(grouped), axis=2) * np.float32(1 / 127)).astype(dtype)


def _searched_scales(grouped: jax.Array) -> jax.Array:
    """For each group of [out, groups, size], the scale of 4-bit codes with the least sum of squared errors."""
    at = jnp.argmax(jnp.abs(grouped), axis=2)
    extreme = -jnp.take_along_axis(grouped, at[:, :, None], axis=2)[:, :, 0]

    def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, chosen = best
        scales = (extreme / jnp.asarray(DIVISORS)[i]).astype(jnp.float16)
        values = _nearest(grouped, scales, -8, 7) * scales.astype(jnp.float32)[:, :, None]
        error = jnp.sum(jnp.square(grouped - values), axis=2)
        better = error < least
        return jnp.where(better, error, least), jnp.where(better, scales, chosen)

    # A scale that stays infinite, because all of them overflow, is refused by the caller.
    start = jnp.full(extreme.shape, jnp.inf), jnp.full(extreme.shape, jnp.inf, jnp.float16)
    return jax.lax.fori_loop(0, len(DIVISORS), attempt, start)[1]


def _nearest(grouped: jax.Array, scales: jax.Array, lowest: int, highest: int) -> jax.Array:
    """The nearest multiples of the scales, as float32 whole numbers in a range; 0 where a scale is 0."""
    divisor = scales.astype(jnp.float32)[:, :, None]
    quotient = jnp.where(divisor == 0, 0, grouped / jnp.where(divisor == 0, 1, divisor))
    return jnp.clip(jnp.round(quotient), lowest, highest)


def _packed(values: jax.Array) -> jax.Array:
    """uint8 [out, width / 2] of whole numbers -8 .. 7, [out, groups, size]: see `linear` for the order."""
    codes = (values + 8).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=2)
    return (low | (high << 4)).reshape(values.shape[0], -1)


def _cast(array: jax.Array, dtype: np.dtype, name: str) -> jax.Array:
    if array.dtype == dtype:
        return array
    cast = array.astype(dtype)
    _check_fits(jnp.all(jnp.isfinite(cast) | ~jnp.isfinite(array)), name, dtype.name)
    return cast


def _check_fits(fits: jax.Array, name: str, form: str) -> None:
    if is_concrete(fits) and not fits:
        raise QuantizationError(f"{name}: expected finite values that fit {form}, got others; use float32 or bfloat16")
