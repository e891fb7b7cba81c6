"""The twelve validation points: their values, their comparison with a reference, and reference files."""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import llorch_jax as lj
from llorch_jax.errors import ReferenceFileError
from llorch_jax.evaluation.validation import POINTS, compare, load_reference

TOKENS = np.random.default_rng(0).integers(0, 257, (2, 6), np.int32)
CONFIG = tiny.CONFIG  # 4 query heads, 2 key/value heads, 2 layers
LOWEST = np.finfo(np.float32).min


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(CONFIG)


@pytest.fixture(scope="module")
def captured(params):
    found = lj.intermediates(params, CONFIG, TOKENS, temperature=0.6, new_tokens=5)
    return {name: np.asarray(value) for name, value in found.items()}


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def layer_norm(norm, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG.layer_norm_epsilon)
    return scaled * np.asarray(norm.weight) + np.asarray(norm.bias)


def affine(dense, x):
    return x @ np.asarray(dense.weight).T + np.asarray(dense.bias)


class TestIntermediates:
    def test_names_shapes_and_dtypes(self, captured):
        heads, kv_heads, head_dim, width = 4, 2, 8, 32
        float32, int32 = np.dtype("float32"), np.dtype("int32")
        assert {name: (value.shape, value.dtype) for name, value in captured.items()} == {
            "01_ln_1": ((2, 6, width), float32),
            "02_q": ((2, 6, heads, head_dim), float32),
            "02_k": ((2, 6, kv_heads, head_dim), float32),
            "02_v": ((2, 6, kv_heads, head_dim), float32),
            "03_k_cache_layer00": ((2, kv_heads, 6, head_dim), float32),
            "03_v_cache_layer00": ((2, kv_heads, 6, head_dim), float32),
            "03_k_cache_layer01": ((2, kv_heads, 6, head_dim), float32),
            "03_v_cache_layer01": ((2, kv_heads, 6, head_dim), float32),
            "04_allowed": ((2, heads, 6, 6), np.dtype(bool)),
            "04_scores": ((2, heads, 6, 6), float32),
            "04_scores_unmasked": ((2, heads, 6, 6), float32),
            "05_attn_out": ((2, 6, width), float32),
            "06_mlp_out": ((2, 6, width), float32),
            "07_block_out": ((2, 6, width), float32),
            "08_logits": ((2, 6, 257), float32),
            "09_last_logits": ((2, 257), float32),
            "10_argmax": ((2,), int32),
            "11_probabilities": ((2, 257), float32),
            "12_greedy": ((2, 5), int32),
            "12_greedy_gaps": ((2, 5), float32),
        }

    def test_the_first_block_step_by_step(self, params, captured):
        block = params.blocks[0]
        embedded = np.asarray(params.wte)[TOKENS] + np.asarray(params.wpe)[:6]
        close(captured["01_ln_1"], layer_norm(block.ln_1, embedded))
        qkv = affine(block.qkv, captured["01_ln_1"])
        by_group = qkv.reshape(2, 6, 2, 4, 8)  # 2 key/value heads, each with 2 query heads, its key and its value
        close(captured["02_q"], by_group[..., :2, :].reshape(2, 6, 4, 8))
        close(captured["02_k"], by_group[..., 2, :])
        close(captured["02_v"], by_group[..., 3, :])
        k, v = (np.repeat(captured[name], 2, axis=2) for name in ("02_k", "02_v"))  # heads 0, 1 look at kv head 0
        close(captured["04_scores_unmasked"], np.einsum("BTNH,BSNH->BNTS", captured["02_q"], k) / np.sqrt(8))
        past = np.broadcast_to(np.tril(np.ones((6, 6), bool)), (2, 4, 6, 6))
        np.testing.assert_array_equal(captured["04_allowed"], past)
        np.testing.assert_array_equal(captured["04_scores"], np.where(past, captured["04_scores_unmasked"], LOWEST))
        weights = np.asarray(jax.nn.softmax(captured["04_scores"], axis=-1))
        heads = np.einsum("BNTS,BSNH->BTNH", weights, v).reshape(2, 6, 32)
        close(captured["05_attn_out"], affine(block.attn_proj, heads))
        middle = embedded + captured["05_attn_out"]
        hidden = np.asarray(jax.nn.gelu(affine(block.fc, layer_norm(block.ln_2, middle))))
        close(captured["06_mlp_out"], affine(block.mlp_proj, hidden))
        close(captured["07_block_out"], middle + captured["06_mlp_out"])

    def test_the_cache_holds_every_token(self, captured, params):
        for name in "kv":
            close(captured[f"03_{name}_cache_layer00"], captured[f"02_{name}"].transpose(0, 2, 1, 3))
        _, cache = lj.forward(params, CONFIG, TOKENS, cache=lj.StaticCache.init(CONFIG, batch_size=2, capacity=6))
        close(captured["03_k_cache_layer01"], cache.keys[1])
        close(captured["03_v_cache_layer01"], cache.values[1])

    def test_logits_and_what_follows_from_them(self, params, captured):
        logits = np.asarray(lj.forward(params, CONFIG, TOKENS))
        close(captured["08_logits"], logits)
        np.testing.assert_array_equal(captured["09_last_logits"], captured["08_logits"][:, -1])
        np.testing.assert_array_equal(captured["10_argmax"], logits[:, -1].argmax(-1))
        close(captured["11_probabilities"], jax.nn.softmax(logits[:, -1] / np.float32(0.6), axis=-1))

    def test_greedy_continuation_and_its_gaps(self, params, captured):
        greedy, _ = lj.generate_tokens(params, CONFIG, TOKENS, 5)
        np.testing.assert_array_equal(captured["12_greedy"], greedy)
        np.testing.assert_array_equal(captured["12_greedy"][:, 0], captured["10_argmax"])
        whole = np.concatenate([TOKENS, greedy[:, :-1]], axis=1)
        second, first = np.moveaxis(np.sort(lj.forward(params, CONFIG, whole)[:, 5:], axis=-1)[..., -2:], -1, 0)
        np.testing.assert_allclose(captured["12_greedy_gaps"], first - second, rtol=0, atol=1e-4)

    def test_a_sliding_window_shows_in_the_mask(self):
        narrow = tiny.random_model(sliding_window=3, n_layer=1)
        allowed = np.asarray(lj.intermediates(narrow.params, narrow.config, TOKENS, new_tokens=1)["04_allowed"])
        band = np.tril(np.ones((6, 6), bool)) & ~np.tril(np.ones((6, 6), bool), -3)
        np.testing.assert_array_equal(allowed, np.broadcast_to(band, allowed.shape))

    def test_a_single_token(self, params):
        found = lj.intermediates(params, CONFIG, TOKENS[:1, :1], new_tokens=1)
        assert found["03_k_cache_layer01"].shape == (1, 2, 1, 8)
        np.testing.assert_array_equal(found["12_greedy"][:, 0], found["10_argmax"])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"tokens": [[257]]}, lj.TokenError, r"tokens\[0, 0\].*257"),
            ({"tokens": [1, 2]}, lj.TokenError, r"\[B, T\]"),
            ({"new_tokens": 64}, lj.CapacityError, "n_positions=64 per row, got 65"),
            ({"new_tokens": 0}, lj.CapacityError, "new_tokens: expected 1 or more, got 0"),
            ({"temperature": 0}, lj.SamplerError, "temperature: .*got 0"),
            ({"temperature": -1.0}, lj.SamplerError, "temperature: .*got -1"),
        ],
    )
    def test_bad_arguments(self, params, change, error, message):
        with pytest.raises(error, match=message):
            lj.intermediates(params, CONFIG, **({"tokens": [[1, 2]]} | change))


class TestCompare:
    def verdict(self, captured, number, **changes):
        """The verdict on one point after changing arrays of the reference; all other points must pass."""
        verdicts = compare(captured, {**captured, **changes})
        assert [verdict.point for verdict in verdicts] == list(POINTS)
        assert all(verdict.passed for verdict in verdicts if verdict.point.number != number)
        return verdicts[number - 1]

    def test_equal_arrays_pass_with_no_error(self, captured):
        verdicts = compare(captured, captured)
        assert [verdict.point.number for verdict in verdicts] == list(range(1, 13))
        assert all(verdict.passed and verdict.error == 0 and not verdict.note for verdict in verdicts)

    @pytest.mark.parametrize("point", [point for point in POINTS if point.tolerance], ids=lambda point: point.number)
    def test_errors_up_to_the_tolerance_pass(self, captured, point):
        for name in [name for name in captured if name.startswith(point.keys) and name != "04_allowed"]:
            for factor in (0.9, 1.1):
                changed = captured[name].astype(np.float64)
                changed.flat[-1] -= factor * point.tolerance
                verdict = self.verdict(captured, point.number, **{name: changed})
                assert verdict.passed == (factor < 1)
                assert verdict.error == pytest.approx(factor * point.tolerance, rel=1e-6)

    @pytest.mark.parametrize("name", ["04_allowed", "10_argmax", "12_greedy"])
    def test_what_must_be_equal(self, captured, name):
        changed = captured[name].copy()
        changed.flat[-1] = 1 - changed.flat[-1]
        verdict = self.verdict(captured, int(name[:2]), **{name: changed})
        assert not verdict.passed
        assert verdict.error >= 1

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("where", ["ours", "theirs", "both"])
    def test_what_is_no_number_fails(self, captured, value, where):
        broken = captured["09_last_logits"].copy()
        broken[0, 3] = value
        ours = captured if where == "theirs" else {**captured, "09_last_logits": broken}
        theirs = captured if where == "ours" else {**captured, "09_last_logits": broken}
        verdict = compare(ours, theirs)[8]
        assert not verdict.passed
        assert verdict.error == np.inf

    @pytest.mark.parametrize("name", ["02_v", "03_k_cache_layer01", "12_greedy"])
    def test_wrong_shape(self, captured, name):
        verdict = self.verdict(captured, int(name[:2]), **{name: captured[name][:1]})
        expected, got = captured[name][:1].shape, captured[name].shape
        assert not verdict.passed
        assert np.isnan(verdict.error)
        assert verdict.note == f"{name}: expected shape {expected}, got {got}"

    def test_a_shape_that_would_broadcast(self, captured):
        assert not self.verdict(captured, 9, **{"09_last_logits": captured["09_last_logits"][:, :1]}).passed

    def test_more_layers_in_the_reference(self, captured):
        verdict = self.verdict(captured, 3, **{"03_k_cache_layer02": captured["03_k_cache_layer01"]})
        assert not verdict.passed
        assert verdict.note == "03_k_cache_layer02: the model has none"

    @pytest.mark.parametrize("key", [key for point in POINTS for key in point.keys])
    def test_a_reference_without_a_part_of_a_point(self, captured, key):
        rest = {name: value for name, value in captured.items() if not name.startswith(key)}
        verdicts = compare(captured, rest)
        assert [verdict.point.number for verdict in verdicts if not verdict.passed] == [int(key[:2])]
        assert verdicts[int(key[:2]) - 1].note == f"{key}: not in the reference"

    def test_what_is_no_value_to_reproduce(self, captured):
        changes = {"12_greedy_gaps": captured["12_greedy_gaps"] + 9, "08_logits_float32_run": np.zeros(3)}
        assert self.verdict(captured, 12, **changes).passed

    def test_arrays_of_nothing(self, captured):
        nothing = {"12_greedy": captured["12_greedy"][:, :0]}
        assert compare({**captured, **nothing}, {**captured, **nothing})[11].passed


class TestReferenceFiles:
    def write(self, folder, sidecar=None, **arrays):
        path = folder / "reference.npz"
        np.savez(path, **arrays)
        if sidecar is not None:
            (folder / "reference.json").write_text(sidecar)
        return path

    def test_arrays_and_temperature(self, tmp_path):
        path = self.write(tmp_path, '{"parameters": {"temperature": 0.5}}', tokens=TOKENS, other=np.ones(3))
        arrays, temperature = load_reference(str(path))
        np.testing.assert_array_equal(arrays["tokens"], TOKENS)
        assert (set(arrays), temperature) == ({"tokens", "other"}, 0.5)

    @pytest.mark.parametrize("sidecar", [None, "{}", '{"parameters": {}}'])
    def test_default_temperature(self, tmp_path, sidecar):
        assert load_reference(self.write(tmp_path, sidecar, tokens=TOKENS))[1] == 0.8

    @pytest.mark.parametrize(
        "sidecar", ["", "[]", "{", '{"parameters": 3}', '{"parameters": {"temperature": "hot"}}', "\xff"]
    )
    def test_broken_sidecar(self, tmp_path, sidecar):
        path = self.write(tmp_path, tokens=TOKENS)
        path.with_suffix(".json").write_bytes(sidecar.encode("latin-1"))
        with pytest.raises(ReferenceFileError, match=r"reference\.json: expected JSON with a number parameters"):
            load_reference(path)

    def test_no_tokens(self, tmp_path):
        with pytest.raises(ReferenceFileError, match="expected an array `tokens`, got a, b"):
            load_reference(self.write(tmp_path, b=np.ones(1), a=np.ones(1)))
        with pytest.raises(ReferenceFileError, match="expected an array `tokens`, got none"):
            load_reference(self.write(tmp_path))

    def test_a_sidecar_of_deep_json(self, tmp_path):
        path = self.write(tmp_path, "[" * 100_000 + "]" * 100_000, tokens=TOKENS)
        with pytest.raises(ReferenceFileError, match=r"reference\.json: .*nested too deeply"):
            load_reference(path)

    @pytest.mark.parametrize("content", [b"", b"no arrays", b"PK\x03\x04", json.dumps({"tokens": [1]}).encode()])
    def test_other_files(self, tmp_path, content):
        path = tmp_path / "reference.npz"
        path.write_bytes(content)
        with pytest.raises(ReferenceFileError, match=re.escape(f"{path}: expected a readable .npz file")):
            load_reference(path)

    def test_a_single_array(self, tmp_path):
        np.save(tmp_path / "tokens.npy", TOKENS)
        with pytest.raises(ReferenceFileError, match=r"expected a readable .npz file"):
            load_reference(tmp_path / "tokens.npy")

    @pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
    def test_truncated_and_damaged(self, tmp_path, place):
        path = tmp_path / "reference.npz"
        np.savez_compressed(path, tokens=np.random.default_rng(0).integers(0, 9, (1, 3000)))
        whole = path.read_bytes()
        cut = int(len(whole) * place)
        for broken in (
            whole[:cut],
            whole[:cut] + bytes(byte ^ 255 for byte in whole[cut : cut + 30]) + whole[cut + 30 :],
        ):
            path.write_bytes(broken)
            with pytest.raises(ReferenceFileError, match=r"expected a readable .npz file"):
                load_reference(path)

    def test_pickles_are_not_read(self, tmp_path):
        path = self.write(tmp_path, tokens=np.asarray([{}], dtype=object))
        with pytest.raises(ReferenceFileError, match=r"expected a readable \.npz file .*allow_pickle"):
            load_reference(path)

    def test_missing_file_and_directory(self, tmp_path):
        os.mkfifo(tmp_path / "fifo.npz")
        for path in (tmp_path / "none.npz", Path(tmp_path), tmp_path / "fifo.npz"):
            with pytest.raises(ReferenceFileError, match=f"{path.name}: (cannot be read|expected a regular file)"):
                load_reference(path)


def test_points_name_every_array_of_the_medium_reference(captured):
    assert {key for point in POINTS for key in point.keys} <= {re.sub(r"_layer\d\d$", "", name) for name in captured}
    assert jnp.float32(min(point.tolerance for point in POINTS if point.tolerance)) == jnp.float32(1e-6)
