"""Caches saved to disk and loaded again."""

import jax
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.cache.files import fingerprint

CONFIG = lj.GPT2Config(vocab_size=97, n_positions=32, n_embd=24, n_layer=2, n_head=4, num_kv_heads=2)
SPECS = ["static", "dynamic", "rotating:6+2", "paged:4", "int8", "int4"]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, lj.init_params(CONFIG, jax.random.key(0)))


def filled(params, spec, dtype="float32"):
    cache = lj.make_cache(CONFIG, spec, batch_size=2, dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 11), np.int32)
    return lj.prefill(params, CONFIG, tokens, cache, lengths=[11, 7])[1]


@pytest.mark.parametrize("spec", SPECS)
def test_continuing_after_load_is_continuing(params, tmp_path, spec):
    cache = filled(params, spec)
    path = tmp_path / "cache.safetensors"
    lj.save_cache(path, cache, fingerprint=fingerprint(params, CONFIG))
    loaded = lj.load_cache(path, fingerprint=fingerprint(params, CONFIG))
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(cache), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.memory_usage() == cache.memory_usage()
    prompt = np.array([[5], [6]], np.int32)
    went_on, _ = lj.generate_tokens(params, CONFIG, prompt, 12, cache=cache)
    resumed, _ = lj.generate_tokens(params, CONFIG, prompt, 12, cache=loaded)
    np.testing.assert_array_equal(resumed, went_on)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.mark.parametrize("spec", ["static", "paged"])
def test_bfloat16(params, tmp_path, spec):
    cache = filled(params, spec, "bfloat16")
    lj.save_cache(tmp_path / "cache", cache)
    for ours, theirs in zip(jax.tree.leaves(lj.load_cache(tmp_path / "cache")), jax.tree.leaves(cache), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_another_model_is_refused(params, tmp_path):
    lj.save_cache(tmp_path / "cache", filled(params, "static"), fingerprint=fingerprint(params, CONFIG))
    other = params.replace(wpe=params.wpe.at[3, 3].add(1e-6))
    with pytest.raises(lj.CacheError, match=r"fingerprint .* got one of"):
        lj.load_cache(tmp_path / "cache", fingerprint=fingerprint(other, CONFIG))
    wider = lj.GPT2Config(**{**vars(CONFIG), "layer_norm_epsilon": 1e-6})
    assert fingerprint(params, wider) != fingerprint(params, CONFIG)


def test_damage_is_refused(params, tmp_path):
    path = tmp_path / "cache"
    lj.save_cache(path, filled(params, "int8"))
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(lj.CacheError, match="cache"):
            lj.load_cache(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 8]) + whole[middle + 1 :])
    with pytest.raises(lj.CacheError, match="checksum"):
        lj.load_cache(path)


def test_a_failed_save_leaves_the_old_file(params, tmp_path):
    path = tmp_path / "cache"
    lj.save_cache(path, filled(params, "static"))
    before = path.read_bytes()
    donated = filled(params, "static")
    lj.prefill(params, CONFIG, np.ones((2, 1), np.int32), donated)
    with pytest.raises(lj.CacheError, match="donated"):
        lj.save_cache(path, donated)
    assert path.read_bytes() == before


def test_impossible_paths(params, tmp_path):
    with pytest.raises(lj.CacheError, match="cannot be written"):
        lj.save_cache(tmp_path / "no" / "folder", filled(params, "static"))
    with pytest.raises(lj.CacheError, match=r"missing: cannot be read \(No such file or directory\)"):
        lj.load_cache(tmp_path / "missing")
