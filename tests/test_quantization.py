"""Weights in low precision: rounding compared with NumPy's, whole models, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import CONFIGS, make_params

import llorch_jax as lj
from llorch_jax.linear import QuantizedMatrix
from llorch_jax.params import nbytes
from llorch_jax.quantization import DIVISORS, Codes, quantize_by_rows, quantize_matrix, quantized_shapes

TINY = CONFIGS[0]
FORMATS = [(8, None), (8, 32), (8, 64), (8, 128), (4, 32), (4, 64)]
SHAPES = [(5, 128), (3, 33), (1, 7), (9, 200)]


def random_matrix(shape, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=shape) * generator.lognormal(size=(shape[0], 1))).astype(dtype)


def grouped(weight, size):
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // size) * size), np.float32)
    padded[:, :columns] = weight
    return padded.reshape(rows, -1, size)


def nearest(groups, scales, lowest, highest):
    wide = scales.astype(np.float32)[:, :, None]
    quotient = np.divide(groups, wide, out=np.zeros_like(groups), where=wide != 0)
    return np.clip(np.rint(quotient), lowest, highest)


def errors_of_int4(weight, size):
    """Squared errors float64 [divisors, out, groups], and scales likewise."""
    groups = grouped(weight, size)
    at = np.abs(groups).argmax(2)[:, :, None]
    extreme = -np.take_along_axis(groups, at, 2)[:, :, 0]
    scales = np.stack([(extreme / divisor).astype(np.float16) for divisor in DIVISORS])
    values = [nearest(groups, each, -8, 7) * each.astype(np.float32)[:, :, None] for each in scales]
    return np.stack([((groups - each).astype(np.float64) ** 2).sum(2) for each in values]), scales


def stored(matrix):
    """Codes of the elements [out, groups, size], read from the bytes as the layout says."""
    codes = np.asarray(matrix.codes)
    groups = matrix.scales.shape[1]
    if matrix.bits == 8:
        return codes.reshape(len(codes), groups, -1).astype(np.int32)
    halves = codes.reshape(len(codes), groups, -1)
    return np.concatenate([halves % 16, halves // 16], axis=2).astype(np.int32) - 8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_int8_is_rounded_as_documented(shape, group_size):
    weight = random_matrix(shape)
    matrix = quantize_matrix(weight, Codes(8, group_size))
    groups = grouped(weight, group_size or shape[1])
    scales = (np.abs(groups).max(2) * np.float32(1 / 127)).astype(np.float16 if group_size else np.float32)
    assert matrix.scales.dtype == scales.dtype
    np.testing.assert_array_equal(matrix.scales, scales)
    np.testing.assert_array_equal(stored(matrix), nearest(groups, scales, -127, 127))
    assert matrix.codes.dtype == np.int8
    assert matrix.shape == shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64])
def test_int4_takes_the_scale_with_the_least_error(shape, group_size):
    weight = random_matrix(shape)
    matrix = quantize_matrix(weight, Codes(4, group_size))
    groups = grouped(weight, group_size)
    errors, candidates = errors_of_int4(weight, group_size)
    scales = np.asarray(matrix.scales)
    assert scales.dtype == np.float16
    assert np.all((candidates == scales).any(0))
    codes = nearest(groups, scales, -8, 7)
    np.testing.assert_array_equal(stored(matrix), codes)
    error = ((groups - codes * scales.astype(np.float32)[:, :, None]).astype(np.float64) ** 2).sum(2)
    assert np.all(error <= errors.min(0) * (1 + 1e-5))
    assert matrix.codes.dtype == np.uint8
    assert matrix.codes.shape[1] * 2 == groups.shape[1] * group_size
    assert matrix.shape == shape


def test_the_search_beats_a_fixed_scale():
    weight = random_matrix((64, 256))
    errors, _ = errors_of_int4(weight, 32)
    error = np.square(weight - quantize_matrix(weight, Codes(4, 32)).dequantize()).sum()
    assert error < 0.95 * errors[DIVISORS == 8].sum()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_dequantized_values_are_code_times_scale(bits, group_size):
    matrix = quantize_matrix(random_matrix((7, 150)), Codes(bits, group_size))
    expected = stored(matrix).astype(np.float32) * np.asarray(matrix.scales, np.float32)[:, :, None]
    np.testing.assert_array_equal(jax.jit(QuantizedMatrix.dequantize)(matrix), expected.reshape(7, -1)[:, :150])


def test_groups_hold_blocks_of_q8_0_and_q4_0():
    """Q8_0: a float16, 32 int8. Q4_0: a float16, 16 bytes; byte i's low nibble is element i, its high one i + 16."""
    generator = np.random.default_rng(0)
    scales = generator.normal(size=(2, 3)).astype(np.float16)
    int8 = generator.integers(-128, 128, (2, 96)).astype(np.int8)
    expected = int8.reshape(2, 3, 32) * scales.astype(np.float32)[:, :, None]
    held = QuantizedMatrix(jnp.asarray(int8), jnp.asarray(scales), 8, 32)
    np.testing.assert_array_equal(held.dequantize(), expected.reshape(2, 96))
    nibbles = generator.integers(0, 256, (2, 48)).astype(np.uint8)
    held = QuantizedMatrix(jnp.asarray(nibbles), jnp.asarray(scales), 4, 32)
    for block, i in np.ndindex(3, 16):
        byte = nibbles[:, 16 * block + i].astype(int)
        scale = scales[:, block].astype(np.float32)
        np.testing.assert_array_equal(held.dequantize()[:, 32 * block + i], scale * (byte % 16 - 8))
        np.testing.assert_array_equal(held.dequantize()[:, 32 * block + 16 + i], scale * (byte // 16 - 8))


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_zeros_stay_zeros(bits, group_size):
    matrix = quantize_matrix(np.zeros((3, 40), np.float32), Codes(bits, group_size))
    assert np.all(np.isfinite(matrix.scales))
    assert not np.any(matrix.dequantize())


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bits, group_size, value):
    weight = random_matrix((7, 150))
    weight[3, 70] = value
    with pytest.raises(lj.QuantizationError, match=f"w: expected finite values that fit int{bits}, got others"):
        quantize_matrix(weight, Codes(bits, group_size), name="w")


def test_scales_beyond_float16_are_refused():
    weight = random_matrix((7, 150))
    weight[3, 70] = 1e8
    quantize_matrix(weight, Codes(8, None))
    for bits, group_size in FORMATS[1:]:
        with pytest.raises(lj.QuantizationError, match="expected finite values"):
            quantize_matrix(weight, Codes(bits, group_size))


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_rows_at_a_time_equal_the_whole(bits, group_size, monkeypatch):
    monkeypatch.setattr("llorch_jax.quantization._BLOCK", 300)
    weight = random_matrix((7, 150))
    seen = []

    def rows(start, stop):
        seen.append((start, stop))
        return weight[start:stop]

    by_rows = quantize_by_rows(weight.shape, rows, Codes(bits, group_size), name="w")
    jax.tree.map(np.testing.assert_array_equal, by_rows, quantize_matrix(weight, Codes(bits, group_size)))
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 7)]


class TestModels:
    @pytest.mark.parametrize("weights", ["int8", "int4"])
    def test_every_multiplied_matrix_is_quantized_and_nothing_else(self, weights):
        params = make_params(TINY)
        quantized = lj.quantize(params, weights, 32)
        assert isinstance(quantized.wte, QuantizedMatrix)
        assert quantized.wte.bits == 8
        for before, after in zip(params.blocks, quantized.blocks, strict=True):
            for name in ("qkv", "attn_proj", "fc", "mlp_proj"):
                assert getattr(after, name).weight.bits == int(weights[3:])
                assert getattr(after, name).weight.group_size == 32
                assert getattr(after, name).bias is getattr(before, name).bias
            assert after.ln_1.weight is before.ln_1.weight
        assert quantized.wpe is params.wpe
        assert quantized.ln_f.bias is params.ln_f.bias
        assert quantized.output_projection is quantized.wte
        assert lj.count_params(quantized) == lj.count_params(params)
        assert nbytes(quantized) == sum(leaf.nbytes for leaf in jax.tree.leaves(quantized)) < nbytes(params) / 2

    def test_w8a8_stores_int8_and_rounds_activations_in_the_blocks_alone(self):
        params = make_params(TINY)
        quantized, int8 = lj.quantize(params, "w8a8"), lj.quantize(params, "int8")
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(quantized), jax.tree.leaves(int8))
        bits = {
            name: getattr(quantized.blocks[0], name).weight.x_bits for name in ("qkv", "attn_proj", "fc", "mlp_proj")
        }
        assert set(bits.values()) == {8}
        assert quantized.wte.x_bits == 16
        assert {matrix.x_bits for matrix in (int8.wte, int8.blocks[0].fc.weight)} == {16}
        assert lj.fingerprint(quantized, TINY) != lj.fingerprint(int8, TINY)

    @pytest.mark.parametrize("weights", ["float16", "bfloat16"])
    def test_dtypes_apply_to_all_arrays(self, weights):
        params = make_params(TINY)
        cast = lj.quantize(params, weights)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(cast)} == {weights}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), params, cast)
        back = lj.quantize(cast, "float32")
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), cast, back)

    def test_shapes_can_be_planned_without_arrays(self):
        shapes = quantized_shapes(TINY, "int4")
        quantized = lj.quantize(make_params(TINY), "int4")
        assert jax.tree.structure(shapes) == jax.tree.structure(quantized)
        assert nbytes(shapes) == nbytes(quantized)

    def test_gpt2_small_in_bytes(self):
        def size(weights, group_size=None):
            return nbytes(quantized_shapes(lj.GPT2Config(), weights, group_size))

        # By hand: V D + 12 L D^2 matrix elements, 4 D P bytes of positions, 13 L D + 2 D float32 biases and norms.
        embedding = 50257 * 768
        blocks = 12 * 12 * 768**2
        rest = 4 * (1024 * 768 + 12 * 13 * 768 + 2 * 768)
        assert size("int8", 32) == (embedding + blocks) * 34 // 32 + rest
        assert size("int4") == embedding * 34 // 32 + blocks * 18 // 32 + rest
        assert size("int8") == embedding + blocks + 4 * (50257 + 12 * 9 * 768) + rest

    @pytest.mark.parametrize(
        ("weights", "group_size", "message"),
        [
            ("int2", None, "weights: expected one of float32, bfloat16, float16, int8, w8a8, int4; got 'int2'"),
            (None, None, "weights: expected one of .* got 'None'"),
            ("int8", 16, "group_size: expected one of None, 32, 64, 128 for int8 weights, got 16"),
            ("w8a8", 32, "group_size: expected one of None for w8a8 weights, got 32"),
            ("int4", 128, "group_size: expected one of 32, 64 for int4 weights, got 128"),
            ("int8", True, "group_size: .* got True"),
            ("int8", "32", "group_size: .* got '32'"),
            ("float16", 32, "group_size: expected one of None for float16 weights, got 32"),
        ],
    )
    def test_unknown_formats_are_refused(self, weights, group_size, message):
        with pytest.raises(lj.QuantizationError, match=message):
            lj.quantize(make_params(TINY), weights, group_size)

    @pytest.mark.parametrize("weights", ["int8", "int4", "float32"])
    def test_quantizing_twice_is_refused(self, weights):
        quantized = lj.quantize(make_params(TINY), "int8")
        with pytest.raises(lj.QuantizationError, match="params: expected floating point, got int8 in wte; quantize"):
            lj.quantize(quantized, weights)

    def test_values_too_large_for_a_dtype_are_refused(self):
        params = make_params(TINY)
        params = params.replace(wpe=params.wpe.at[1, 1].set(1e5))
        with pytest.raises(lj.QuantizationError, match="wpe: expected finite values that fit float16"):
            lj.quantize(params, "float16")
