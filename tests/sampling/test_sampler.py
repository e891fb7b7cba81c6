"""Samplers: the masks against transformers' results, the draws against the masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import llorch_jax as lj
from llorch_jax.sampling import apply_temperature, apply_top_k, apply_top_p, apply_typical_p
from llorch_jax.sampling.drawing import CHUNK, draw, random_bits

DRAWS = 5_000
PEAKED = np.random.default_rng(3).normal(0, 2, 300).astype(np.float32)  # more tokens than the least candidates


def softmax(logits):
    """In float64, of float32 logits."""
    shifted = np.asarray(logits, np.float64)
    weights = np.exp(shifted - shifted.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def sample(sampler, logits, keys):
    """The ids that a sampler without history or state chooses."""
    ids = jnp.zeros((logits.shape[0], 0), jnp.int32)
    return sampler.sample(logits, keys, None, ids, sampler.init(logits.shape[0]))[0]


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def draw_often(sampler, logits, count=DRAWS, seed=0):
    """Many draws from the same logits [V]."""
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
    return np.asarray(jax.jit(sample)(sampler, rows, keys(count, seed)))


class TestMasks:
    @pytest.mark.parametrize(
        ("name", "transform"), [("temperature", apply_temperature), ("top_k", apply_top_k), ("top_p", apply_top_p)]
    )
    def test_transformers_probabilities(self, name, transform):
        about, data = references.sidecar("sampling"), references.arrays("sampling")
        setting = about["parameters"][name]
        ours = softmax(transform(data["logits"], jnp.asarray(setting, jnp.int32 if name == "top_k" else jnp.float32)))
        np.testing.assert_array_equal(ours > 0, data[name] > 0)
        assert (ours > 0).sum(-1).tolist() == about["kept"][name]
        floor = about["float32_floor"][name]["max_abs_error"]
        np.testing.assert_allclose(ours, data[name], rtol=0, atol=4 * floor)

    @given(hnp.arrays(np.float32, (3, 37), elements=st.floats(-30, 30, width=32)), st.integers(1, 50))
    def test_top_k_keeps_the_k_largest(self, logits, top_k):
        masked = np.asarray(apply_top_k(logits, jnp.int32(top_k)))
        kept = np.isfinite(masked)
        assert np.all(kept.sum(-1) == min(top_k, 37))
        np.testing.assert_array_equal(masked[kept], logits[kept])
        for row, mask in zip(logits, kept, strict=True):
            assert row[mask].min() >= row[~mask].max(initial=-np.inf)

    @given(hnp.arrays(np.float32, (3, 37), elements=st.floats(-30, 30, width=32)), st.floats(0.01, 1))
    def test_top_p_keeps_the_fewest_that_reach_it(self, logits, top_p):
        kept = np.isfinite(apply_top_p(logits, jnp.float32(top_p)))
        for probabilities, mask in zip(softmax(logits), kept, strict=True):
            assert probabilities[mask].min() >= probabilities[~mask].max(initial=0) - 1e-9
            assert probabilities[mask].sum() >= top_p - 1e-5
            if mask.sum() > 1 and top_p < 1:
                assert probabilities[mask].sum() - probabilities[mask].min() <= top_p + 1e-5

    def test_of_equal_tokens_the_lowest_ids_are_kept(self):
        logits = jnp.asarray([[0.0, 1, 2, 1, 1, 1]])
        kept = np.isfinite(apply_top_k(logits, jnp.int32(3)))
        np.testing.assert_array_equal(np.flatnonzero(kept), [1, 2, 3])

    def test_top_p_of_1_keeps_every_token(self):
        # in float32 the probabilities of these add up to 1 long before the last
        logits = np.random.default_rng(0).normal(0, 5, (2, 50257)).astype(np.float32)
        assert np.all(np.isfinite(apply_top_p(logits, jnp.float32(1))))

    def test_a_setting_per_row(self):
        logits = np.stack([PEAKED, PEAKED[::-1], PEAKED])
        for transform, settings in (
            (apply_temperature, jnp.asarray([0.5, 1.0, 2.0])),
            (apply_top_k, jnp.asarray([1, 7, 300])),
            (apply_top_p, jnp.asarray([0.1, 0.9, 1.0])),
        ):
            alone = [transform(logits[i : i + 1], settings[i]) for i in range(3)]
            np.testing.assert_array_equal(transform(logits, settings), np.concatenate(alone))


class TestDraws:
    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": 0.5},
            {"temperature": 1.0, "top_k": 5},
            {"temperature": 0.8, "top_k": 64},
            {"temperature": 0.8, "top_k": 65},
            {"temperature": 1.0, "top_k": 5000},
            {"temperature": 1.3, "top_p": 0.7},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        ],
        ids=str,
    )
    def test_frequencies_are_the_masked_probabilities(self, settings):
        logits = apply_temperature(PEAKED[None], jnp.float32(settings["temperature"]))
        if "top_k" in settings:
            logits = apply_top_k(logits, jnp.int32(settings["top_k"]))
        if "top_p" in settings:
            logits = apply_top_p(logits, jnp.float32(settings["top_p"]))
        expected = DRAWS * softmax(logits)[0]
        observed = np.bincount(draw_often(lj.Sampling.create(**settings), PEAKED), minlength=300)
        assert observed[expected == 0].sum() == 0
        common = expected >= 10
        expected = np.append(expected[common], expected[~common].sum() + 1e-9)
        observed = np.append(observed[common], observed[~common].sum())
        chi_square, freedom = ((observed - expected) ** 2 / expected)[expected > 5].sum(), common.sum()
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 8  # far beyond the 99.9th percentile

    def test_top_k_decides_before_top_p(self):
        logits = np.log(np.asarray([0.3, 0.25, 0.2, 0.15, 0.1], np.float32))
        drawn = set(draw_often(lj.Sampling.create(1.0, top_k=3, top_p=0.7), logits, 2000).tolist())
        assert drawn == {0, 1}  # 0.4 and 0.33 of what three tokens hold; of all five tokens three would be needed

    def test_equal_tokens_beyond_top_k_are_never_drawn(self):
        assert set(draw_often(lj.Sampling.create(1.0, top_k=3), np.zeros(300, np.float32), 2000).tolist()) == {0, 1, 2}

    @pytest.mark.parametrize("settings", [{}, {"top_k": 10}, {"top_p": 0.9}])
    def test_the_coldest_temperature_takes_the_most_likely(self, settings):
        logits = np.asarray([-1e4, 9999, 1e4, 9998], np.float32)
        assert set(draw_often(lj.Sampling.create(1e-30, **settings), logits, 100).tolist()) == {2}

    def test_a_setting_per_row(self):
        rows = np.stack([PEAKED, PEAKED[::-1].copy(), np.roll(PEAKED, 9)])
        temperature, top_k, top_p = [0.3, 1.0, 5.0], [50, 1, 3], [0.99, 0.9, 0.8]
        together = lj.Sampling.create(temperature, top_k, top_p)
        for seed in range(20):
            drawn = sample(together, rows, keys(3, seed))
            for i in range(3):
                alone = lj.Sampling.create(temperature[i], top_k[i], top_p[i])
                assert int(sample(alone, rows[i : i + 1], keys(3, seed)[i : i + 1])[0]) == int(drawn[i])
            assert int(drawn[1]) == int(rows[1].argmax())

    def test_a_row_does_not_depend_on_the_others(self):
        rows, sampler = np.stack([PEAKED] * 4), lj.Sampling.create(1.0)
        one, other = sample(sampler, rows, keys(4)), sample(sampler, rows * np.float32(-1), keys(4))
        mixed = sample(sampler, rows * np.asarray([[1], [-1], [1], [-1]], np.float32), keys(4))
        np.testing.assert_array_equal(mixed, [one[0], other[1], one[2], other[3]])

    def test_same_key_same_token_and_another_key_others(self):
        sampler = lj.Sampling.create(1.0, top_k=50)
        first = draw_often(sampler, PEAKED, 50)
        np.testing.assert_array_equal(draw_often(sampler, PEAKED, 50), first)
        assert not np.array_equal(draw_often(sampler, PEAKED, 50, seed=1), first)

    def test_a_changed_setting_compiles_nothing(self):
        jitted = jax.jit(lambda *arguments: sample(*arguments))
        for temperature, top_k, top_p in [(0.5, 1, 0.1), (1.5, 64, 0.99), (1, 17, 0.9)]:
            jitted(lj.Sampling.create(temperature, top_k, top_p), PEAKED[None], keys(1))
        assert jitted._cache_size() == 1
        jitted(lj.Sampling.create(1.0, 65, 0.5), PEAKED[None], keys(1))
        assert jitted._cache_size() == 2  # more candidates

    def test_a_top_k_beyond_int32_keeps_all(self):
        beyond, all_of_them = lj.Sampling.create(1.0, top_k=2**40), lj.Sampling.create(1.0)
        assert sample(beyond, PEAKED[None], keys(1)) == sample(all_of_them, PEAKED[None], keys(1))


class TestLargeVocabularies:
    """GPT-2's has more tokens than are sorted at once, and than are drawn from at once."""

    ranks = np.random.default_rng(5).permutation(50257)
    zipf = (-1.5 * np.log1p(ranks)).astype(np.float32)  # the first 250 tokens or so hold 95 %

    def test_draws_are_those_of_categorical(self):
        logits = np.stack([self.zipf, np.zeros(50257, np.float32), self.zipf[::-1]])
        logits[1, :100] = -np.inf
        for seed in range(3):
            expected = jax.vmap(jax.random.categorical)(keys(3, seed), jnp.asarray(logits))
            np.testing.assert_array_equal(jax.jit(draw)(logits, keys(3, seed)), expected)

    @pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1])
    def test_bits(self, count):
        expected = [jax.random.bits(key, (count,)) for key in keys(2)]
        np.testing.assert_array_equal(random_bits(keys(2), count), expected)

    def test_another_kind_of_key(self):
        others = jax.random.split(jax.random.key(0, impl="rbg"), 2)
        logits = jnp.stack([self.zipf, self.zipf])
        np.testing.assert_array_equal(draw(logits, others), jax.vmap(jax.random.categorical)(others, logits))

    @pytest.mark.parametrize("scale", [1.0, 0.6, 0.0], ids=["few", "more", "all"])
    def test_top_p_alone_draws_as_if_all_were_sorted(self, scale):
        logits = np.broadcast_to(self.zipf * np.float32(scale), (8, 50257))
        values, ids = jax.lax.top_k(logits, 50257)
        probabilities = softmax(values)
        before = np.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(jnp.asarray(before < 0.9), values, -jnp.inf)
        for seed in range(4):
            ranks = jax.vmap(jax.random.categorical)(keys(8, seed), kept)
            drawn = _sample(lj.Sampling.create(1.0, top_p=0.9), logits, keys(8, seed))
            np.testing.assert_array_equal(
                drawn, np.take_along_axis(np.asarray(ids), np.asarray(ranks)[:, None], 1)[:, 0]
            )

    @pytest.mark.parametrize("scale", [1.0, 0.6, 0.01], ids=["few", "more", "all"])
    def test_typical_p_keeps_the_nearest_to_the_entropy(self, scale):
        logits = self.zipf[None] * np.float32(scale)
        probabilities = softmax(logits)[0]
        surprise = -np.log(probabilities)
        distance = np.abs(surprise - (probabilities * surprise).sum())
        order = np.argsort(distance, kind="stable")
        expected = order[: np.searchsorted(np.cumsum(probabilities[order]), 0.5) + 1]
        kept = np.flatnonzero(np.isfinite(_typical(logits, jnp.float32(0.5))[0]))
        assert len(np.setxor1d(kept, expected)) <= len(expected) // 1000  # sums in float32 end a few tokens off


_sample = jax.jit(sample)
_typical = jax.jit(apply_typical_p)


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = np.asarray([[0, 3, 3, 1], [2, 2, 2, 2], [-5, -4, -9, -4]], np.float32)
    chosen = sample(lj.Greedy(), logits, keys(3))
    np.testing.assert_array_equal(chosen, [1, 0, 1])
    assert chosen.dtype == jnp.int32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature: .*got -0.5"),
        ({"temperature": float("nan")}, "temperature: .*got nan"),
        ({"temperature": float("inf")}, "temperature: .*got inf"),
        ({"temperature": 1e-40}, "temperature: .*1e-30.*got 1e-40"),
        ({"temperature": "hot"}, "temperature: .*got 'hot'"),
        ({"temperature": None}, "temperature: .*got None"),
        ({"temperature": True}, "temperature: .*got True"),
        ({"temperature": [0.5, -1.0]}, r"temperature: .*got \[0.5, -1.0\]"),
        ({"temperature": []}, r"temperature: .*got \[\]"),
        ({"temperature": [[1.0]]}, r"temperature: .*got \[\[1.0\]\]"),
        ({"top_k": 2.5}, "top_k: .*got 2.5"),
        ({"top_k": [3, -2]}, r"top_k: .*got \[3, -2\]"),
        ({"top_p": -0.1}, "top_p: expected numbers from 0 up to 1, got -0.1"),
        ({"top_p": 1.01}, "top_p: .*got 1.01"),
        ({"top_p": "0.9"}, "top_p: .*got '0.9'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(lj.SamplerError, match=message):
        lj.Sampling.create(**settings)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
@pytest.mark.parametrize("batch", [1, 2])
def test_settings_for_another_number_of_rows(name, batch):
    sampler = lj.Sampling.create(**{name: [1, 1, 1] if name == "top_k" else [0.5] * 3})
    with pytest.raises(lj.SamplerError, match=f"{name}: expected one value or {batch}, one per row, got 3"):
        sample(sampler, np.stack([PEAKED] * batch), keys(batch))
