"""Transforms of logits: transformers' results where there are some, plain Python for the others."""

import collections
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import llorch_jax as lj
from llorch_jax import sampling
from llorch_jax.sampling import History
from llorch_jax.sampling.penalties import match_lengths

V = 23
KEYS = jax.random.split(jax.random.key(0), 3)
NONE = jnp.zeros((3, 0), jnp.int32)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def history(rows, prompts=None):
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), 16), V - 1, np.int32)  # padding is a token too, and must not count
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    prompts = lengths if prompts is None else np.asarray(prompts, np.int32)
    return History(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(prompts))


def random_logits(seed, rows=3):
    return np.random.default_rng(seed).normal(0, 2, (rows, V)).astype(np.float32)


JITTED = {name: jax.jit(getattr(sampling, name)) for name in sampling.__all__ if name.startswith("apply_")}
rows_of_few_tokens = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=3, max_size=3)


class TestTransformers:
    @pytest.mark.parametrize("name", ["min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"])
    def test_truncation(self, name):
        self.check(name, JITTED[f"apply_{name}"](references.arrays("sampling")["logits"], self.setting(name)))

    def test_repetition_penalty(self):
        logits, past = self.given()
        self.check(
            "repetition_penalty", JITTED["apply_repetition_penalty"](logits, past, self.setting("repetition_penalty"))
        )

    def test_no_repeat_ngram(self):
        logits, past = self.given()
        ours = JITTED["apply_no_repeat_ngram"](logits, past, jnp.int32(3))
        np.testing.assert_array_equal(np.isneginf(ours), references.arrays("sampling")["banned"])
        self.check("no_repeat_ngram_size", ours)

    def test_chain(self):
        logits, past = self.given()
        names = ("repetition_penalty", "no_repeat_ngram_size", "temperature", "top_k", "top_p")
        sampler = lj.Sampling.create(**{name: references.sidecar("sampling")["parameters"][name] for name in names})
        self.check("chain", sampler.replace(more={}).filtered(sampler.penalised(logits, past, NONE)))

    def setting(self, name):
        return jnp.float32(references.sidecar("sampling")["parameters"][name])

    def given(self):
        data = references.arrays("sampling")
        lengths = jnp.full(8, data["previous_ids"].shape[1], jnp.int32)
        return jnp.asarray(data["logits"]), History.of(jnp.asarray(data["previous_ids"]), lengths, 40)

    def check(self, name, logits):
        about, expected = references.sidecar("sampling"), references.arrays("sampling")[name]
        ours = softmax(logits)
        np.testing.assert_array_equal(ours > 0, expected > 0)
        assert (ours > 0).sum(-1).tolist() == about["kept"][name]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=4 * about["float32_floor"][name]["max_abs_error"])


class TestTruncation:
    @examples(20)
    @given(st.integers(0, 10**6), st.floats(0.1, 3))
    def test_top_n_sigma(self, seed, n):
        logits = random_logits(seed)
        logits[:, :4] = -np.inf
        kept = np.isfinite(JITTED["apply_top_n_sigma"](logits, jnp.float32(n)))
        for row, mask in zip(logits.astype(np.float64), kept, strict=True):
            expected = row >= row.max() - n * row[4:].std()
            near = np.abs(row - (row.max() - n * row[4:].std())) < 1e-4
            assert np.all((mask == expected) | near)

    def test_xtc_spares_the_least_of_the_top_choices(self):
        logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]] * 3 + [[0.9, 0.05, 0.03, 0.02]]))
        keys = jax.random.split(jax.random.key(0), 4)
        kept = np.isfinite(
            JITTED["apply_xtc"](logits, keys, jnp.asarray([1.0, 0, 1, 1]), jnp.asarray([0.15, 0.15, 0.5, 0.1]))
        )
        assert kept.tolist() == [[False, False, True, True], [True] * 4, [True] * 4, [True] * 4]

    def test_xtc_acts_as_often_as_it_should(self):
        logits = jnp.broadcast_to(jnp.log(jnp.asarray([0.6, 0.4])), (4000, 2))
        keys = jax.random.split(jax.random.key(1), 4000)
        acted = np.isneginf(JITTED["apply_xtc"](logits, keys, jnp.float32(0.3), jnp.float32(0.1))).any(axis=1)
        assert acted.mean() == pytest.approx(0.3, abs=0.03)

    def test_a_setting_per_row(self):
        logits = random_logits(4)
        for name, values in (
            ("min_p", [0.0, 0.2, 0.9]),
            ("typical_p", [0.3, 0.6, 1.0]),
            ("epsilon_cutoff", [0, 0.1, 0.2]),
        ):
            apply = JITTED[f"apply_{name}"]
            together = apply(logits, jnp.asarray(values, jnp.float32))
            for row, value in enumerate(values):
                np.testing.assert_array_equal(together[row], apply(logits[row : row + 1], jnp.float32(value))[0])

    def test_something_is_always_left(self):
        flat = jnp.zeros((1, 1000))
        for name in ("min_p", "epsilon_cutoff", "eta_cutoff", "typical_p"):
            assert np.isfinite(JITTED[f"apply_{name}"](flat, jnp.float32(1.0))).any()


class TestPenalties:
    @examples(25)
    @given(rows_of_few_tokens)
    def test_match_lengths(self, rows):
        found = match_lengths(history(rows), None, None)
        for row, lengths in zip(rows, np.asarray(found), strict=True):
            for place in range(len(row)):
                longest = 0
                while longest < place and row[place - 1 - longest] == row[len(row) - 1 - longest]:
                    longest += 1
                assert lengths[place] == longest

    @examples(25)
    @given(rows_of_few_tokens, st.integers(0, 10**6))
    def test_frequency_and_presence(self, rows, seed):
        logits, prompts = random_logits(seed), [len(row) // 2 for row in rows]
        past = history(rows, prompts)
        frequency = JITTED["apply_frequency_penalty"](logits, past, jnp.float32(0.7))
        presence = JITTED["apply_presence_penalty"](logits, past, jnp.asarray([0.1, 0.2, 0.3]))
        for row, tokens in enumerate(rows):
            counts = collections.Counter(tokens[prompts[row] :])
            expected = [logits[row, id] - np.float32(0.7) * counts[id] for id in range(V)]
            np.testing.assert_allclose(frequency[row], expected, rtol=1e-6)
            expected = [logits[row, id] - np.float32((row + 1) / 10) * (counts[id] > 0) for id in range(V)]
            np.testing.assert_allclose(presence[row], expected, rtol=1e-5, atol=1e-6)

    @examples(25)
    @given(rows_of_few_tokens, st.integers(0, 4))
    def test_no_repeat_ngram(self, rows, size):
        banned = np.isneginf(JITTED["apply_no_repeat_ngram"](jnp.zeros((3, V)), history(rows), jnp.int32(size)))
        for row, mask in zip(rows, banned, strict=True):
            grams = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)} if size else set()
            expected = [(*row[len(row) - size + 1 :], id) in grams for id in range(V)]
            assert mask.tolist() == expected

    @examples(25)
    @given(rows_of_few_tokens, st.integers(1, 3))
    def test_dry(self, rows, allowed):
        arguments = jnp.float32(0.8), jnp.float32(1.75), jnp.int32(allowed), jnp.asarray([[3]], jnp.int32)
        ours = JITTED["apply_dry"](jnp.zeros((3, V)), history(rows), *arguments)
        for row, logits in zip(rows, np.asarray(ours), strict=True):
            penalty = collections.defaultdict(float)
            for place, token in enumerate(row):
                length = 0
                while length < place and row[place - 1 - length] == row[len(row) - 1 - length] != 3:
                    length += 1
                if length >= allowed:
                    penalty[token] = max(penalty[token], 0.8 * 1.75 ** (length - allowed))
            penalty[3] = 0.0  # the breaker itself is exempt, as in llama.cpp
            np.testing.assert_allclose(logits, [-penalty[id] for id in range(V)], rtol=1e-5)

    def test_bad_words(self):
        past = history([[5, 1, 2], [1], [2, 1]])
        sampler = lj.Sampling.create(bad_words=[[1, 2, 7], [9], [1, 4]])
        banned = np.isneginf(sampler.penalised(jnp.zeros((3, V)), past, NONE))
        assert [np.flatnonzero(row).tolist() for row in banned] == [[7, 9], [4, 9], [4, 9]]

    def test_min_new_tokens_and_forced_tokens(self):
        past = history([[1, 1, 1], [1, 1, 1], [1, 1, 1]], prompts=[3, 2, 1])
        sampler = lj.Sampling.create(min_new_tokens=[1, 1, 3], forced_tokens=[6, None])
        logits = np.asarray(
            sampler.penalised(jnp.zeros((3, V)), past, jnp.asarray([[4, 8], [4, -1], [4, 8]], jnp.int32))
        )
        assert np.flatnonzero(np.isfinite(logits[0])).tolist() == [6]
        assert np.isfinite(logits[1]).all()
        assert np.flatnonzero(np.isneginf(logits[2])).tolist() == [4, 8]

    def test_logit_bias(self):
        sampler = lj.Sampling.create(logit_bias={3: 1.5, 0: -100.0})
        logits = np.asarray(sampler.penalised(jnp.zeros((2, V)), None, NONE))
        assert (logits[:, 3] == 1.5).all()
        assert (logits[:, 0] == -100).all()
        assert np.count_nonzero(logits) == 4


class TestIdsPerRow:
    ROWS: ClassVar[dict[str, list]] = {
        "logit_bias": [{3: 2.0, 5: -1.0}, {}, {1: 4.0}],
        "bad_words": [[[2], [4, 1]], [], [[5, 6, 2]]],
        "forced_tokens": [[4], [None, 2, 3], []],
        "dry_breakers": [[], [2], [1, 3, 6]],
    }

    @pytest.mark.parametrize("name", ROWS)
    def test_each_row_is_as_alone(self, name):
        past, logits = history([[2, 4, 2, 4], [6, 2, 6, 2, 6], [5, 6, 5, 6]], [3, 4, 4]), jnp.asarray(random_logits(8))
        more = {"dry_multiplier": 0.5} if name == "dry_breakers" else {}
        together = lj.Sampling.create(**{name: self.ROWS[name]}, **more).penalised(logits, past, NONE)
        for row, value in enumerate(self.ROWS[name]):
            alone = lj.Sampling.create(**({name: value} if value else {}), **more)
            one = jax.tree.map(lambda array, row=row: array[row : row + 1], past)
            expected = alone.penalised(logits[row : row + 1], one, NONE)
            np.testing.assert_array_equal(together[row : row + 1], expected)

    def test_other_ids_compile_nothing(self):
        traces = []

        @jax.jit
        def run(sampler, logits, past):
            traces.append(1)
            return sampler.penalised(logits, past, NONE)

        past, logits = history([[2, 4, 2, 4], [6, 2, 6, 2, 6], [5, 6, 5, 6]]), random_logits(8)
        for bias, words, forced in [
            ({1: 1.0, 2: 1.0, 3: 1.0}, [[1, 2, 3], [4], [5]], [None, 1, 2]),
            ({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}, [[1, 2, 3, 4], [4], [5], [6]], [None, 1, 2, 3]),
        ]:
            run(lj.Sampling.create(logit_bias=bias, bad_words=words, forced_tokens=forced), logits, past)
        assert len(traces) == 1


class TestMirostat:
    def test_one_step_is_what_plain_python_does(self):
        logits, keys = random_logits(2), jax.random.split(jax.random.key(0), 3)
        sampler = lj.Mirostat.create(tau=1.0, eta=0.3)
        mu = jnp.asarray([2.0, 0.01, 4.0])
        token, after = sampler.sample(jnp.asarray(logits), keys, None, NONE, mu)
        for row, probabilities in enumerate(softmax(logits)):
            surprise = -np.log2(probabilities)
            kept = (surprise <= float(mu[row])) | (probabilities == probabilities.max())
            assert kept[token[row]]
            observed = -math.log2(probabilities[token[row]] / probabilities[kept].sum())
            assert float(after[row]) == pytest.approx(float(mu[row]) - 0.3 * (observed - 1.0), rel=1e-4)

    def test_surprise_settles_at_the_target(self):
        logits = jnp.broadcast_to(jnp.asarray(np.random.default_rng(0).normal(0, 2, 500).astype(np.float32)), (64, 500))
        sampler, mu = lj.Mirostat.create(tau=3.0), jnp.full(64, 6.0)
        step, seen = jax.jit(sampler.sample), []
        for count in range(100):
            _, after = step(logits, jax.random.split(jax.random.key(count), 64), None, NONE, mu)
            seen.append(np.mean((mu - after) / 0.1 + 3.0))
            mu = after
        assert np.mean(seen[60:]) == pytest.approx(3.0, abs=0.2)


class TestSettings:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"min_p": 1.5}, "min_p: expected numbers from 0 up to 1, got 1.5"),
            ({"typical_p": -0.1}, "typical_p"),
            ({"top_k": -2}, "top_k: expected whole numbers from 1 up, or 0 or -1 for all tokens, got -2"),
            ({"temperature": 1e-50}, "temperature: expected 0, for the most likely token"),
            ({"temperature": 1e300}, "temperature"),
            ({"temperature": [[1.0], [1.0, 2.0]]}, "temperature"),
            ({"frequency_penalty": 1e300}, "frequency_penalty: expected finite numbers, got 1e"),
            ({"repetition_penalty": 0.0}, "repetition_penalty: expected finite numbers above 0"),
            ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size: expected whole numbers"),
            ({"bad_words": [[]]}, "bad_words: expected a list of lists of token ids, none empty"),
            ({"logit_bias": {3: math.inf}}, "logit_bias"),
            ({"logit_bias": {-1: 1.0}}, "logit_bias"),
            ({"logit_bias": {3: 1e300}}, "logit_bias"),
            ({"logit_bias": {3: True}}, "logit_bias"),
            ({"forced_tokens": [-2]}, "forced_tokens"),
            ({"dry_base": 2.0}, "dry_base: expected together with dry_multiplier"),
            ({"xtc_threshold": 0.2}, "xtc_threshold: expected together with xtc_probability"),
            ({"repeat_last_n": 8}, "repeat_last_n: expected together with repetition_penalty or frequency_penalty"),
            ({"temprature": 1.0}, "temprature: expected a setting of Sampling, .*; did you mean temperature\\?"),
            ({"do_sample": True}, "do_sample: .* did you mean temperature, where 0 takes the most likely token"),
            ({"max_tokens": 3}, "max_tokens: .* did you mean max_new_tokens of the call"),
            ({"num_beams": 3}, "num_beams: .* did you mean beam_search"),
            ({"zzzz": 3}, "zzzz: .*; known are temperature, top_k"),
        ],
    )
    def test_impossible_settings(self, given, message):
        with pytest.raises(lj.SamplerError, match=message):
            lj.Sampling.create(**given)

    def test_mirostat(self):
        with pytest.raises(lj.SamplerError, match="tau: expected finite numbers above 0"):
            lj.Mirostat.create(tau=0)
        with pytest.raises(lj.SamplerError, match="mirostat_tau: expected a temperature above 0 and no other"):
            sampling.make_sampler(1.0, mirostat_tau=3.0, top_k=4)

    def test_rows_must_fit(self):
        with pytest.raises(lj.SamplerError, match="min_p: expected one value or 3, one per row, got 2"):
            lj.Sampling.create(min_p=[0.1, 0.2]).sample(jnp.zeros((3, V)), KEYS, None, NONE, None)

    def test_a_history_is_asked_for(self):
        with pytest.raises(lj.SamplerError, match="history: expected one for repetition_penalty"):
            lj.Sampling.create(repetition_penalty=1.1).sample(jnp.zeros((3, V)), KEYS, None, NONE, None)

    def test_breakers(self):
        assert sampling.breakers_of(["a", "b\n", ":", "c"]) == [1, 2]

    @pytest.mark.parametrize(
        "given",
        [
            {"top_k": 0},
            {"top_k": -1},
            {"top_p": 1.0},
            {"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_n_sigma": -1.0},
            {"xtc_probability": 0.0, "xtc_threshold": 0.3},
            {"repetition_penalty": 1.0, "repeat_last_n": 4, "frequency_penalty": 0, "presence_penalty": [0, 0, 0]},
            {"dry_multiplier": 0.0, "dry_base": 2.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0},
            {"logit_bias": {}, "bad_words": [], "forced_tokens": [], "dynatemp_range": 0.0},
        ],
        ids=lambda given: ", ".join(given),
    )
    def test_what_is_off_is_not_compiled_in(self, given):
        assert jax.tree.structure(lj.Sampling.create(0.7, **given)) == jax.tree.structure(lj.Sampling.create(0.7))
        assert isinstance(sampling.make_sampler(0, **given), lj.Greedy)

    def test_representations_print_no_arrays(self):
        sampler = lj.Sampling.create([0.1, 0.2], top_k=[3, 4], logit_bias={3: 1.0})
        assert repr(sampler) == "Sampling(temperature, top_k, logit_bias)"
        assert repr(lj.Sampling.superset([{}])).startswith("Sampling(superset, temperature, top_k, top_p, ")


class TestWindows:
    def test_penalties_look_at_the_last_tokens_only(self):
        past = history([[5, 5, 1, 2, 1], [5, 1, 2], [7]], prompts=[2, 1, 1])
        logits = random_logits(3)
        cut = history([[1, 2, 1], [5, 1, 2], [7]], prompts=[0, 1, 1])
        for name, value in (("repetition_penalty", 1.5), ("frequency_penalty", 0.4), ("presence_penalty", 0.3)):
            windowed = lj.Sampling.create(**{name: value}, repeat_last_n=3).penalised(logits, past, NONE)
            expected = lj.Sampling.create(**{name: value}).penalised(logits, cut, NONE)
            np.testing.assert_array_equal(windowed, expected)
            none = lj.Sampling.create(**{name: value}, repeat_last_n=0).penalised(logits, past, NONE)
            np.testing.assert_array_equal(none, logits)

    def test_a_breaker_is_not_penalised_itself(self):
        # What llama.cpp gives: the token 3 that would prolong "0 1" is a breaker, and keeps its probability.
        past = history([[0, 1, 3, 4, 0, 1]] * 3)
        sampler = lj.Sampling.create(dry_multiplier=0.8, dry_allowed_length=2, dry_breakers=[3])
        np.testing.assert_array_equal(sampler.penalised(jnp.zeros((3, V)), past, NONE), np.zeros((3, V)))
        other = lj.Sampling.create(dry_multiplier=0.8, dry_allowed_length=2, dry_breakers=[4])
        assert float(other.penalised(jnp.zeros((3, V)), past, NONE)[0, 3]) == pytest.approx(-0.8)


class TestDynamicTemperature:
    def test_is_that_of_llama_cpp(self):
        logits = random_logits(4)
        logits[1, 5:] = -np.inf
        logits[2] = 0.0  # of the largest entropy
        found = sampling.dynamic_temperature(jnp.asarray(logits), jnp.float32(0.9), jnp.float32(0.5), jnp.float32(1.3))
        for row, got in zip(logits, found, strict=True):
            left = row[np.isfinite(row)]
            probabilities = softmax(left)
            share = -np.sum(probabilities * np.log(probabilities)) / np.log(len(left))
            assert float(got) == pytest.approx(0.4 + 1.0 * share**1.3, rel=1e-5)
        assert float(found[2]) == pytest.approx(1.4, rel=1e-5)

    def test_rows_without_a_range_keep_their_temperature(self):
        spread = jnp.asarray([0.0, 0.5, 0.0])
        found = sampling.dynamic_temperature(jnp.asarray(random_logits(4)), jnp.float32(0.9), spread, jnp.float32(1.0))
        assert found[0] == found[2] == jnp.float32(0.9)
        assert found[1] != jnp.float32(0.9)


class TestNothingLeft:
    """What a sampler says where no token is left, and where few are."""

    def test_top_choices_that_are_cut_off_already_do_not_count(self):
        logits = np.tile(np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32)), (3, 1))
        sampler = lj.Sampling.create(1.0, top_k=3, xtc_probability=1.0, xtc_threshold=0.0)
        tokens, _ = sampler.sample(jnp.asarray(logits), KEYS, None, NONE, None)
        assert tokens.tolist() == [2, 2, 2]

    @pytest.mark.parametrize(
        "given",
        [
            {"logit_bias": dict.fromkeys(range(V), -math.inf)},
            {"bad_words": [[id] for id in range(V)], "top_k": 4},
            {"bad_words": [[id] for id in range(V)], "top_p": 0.5},
            {"bad_words": [[id] for id in range(V)], "greedy": True},
        ],
        ids=lambda given: ", ".join(given),
    )
    def test_a_sampler_that_bans_all_chooses_none(self, given):
        sampler = lj.Sampling.create(**given)
        past = history([[1], [2], [3]])
        tokens, _ = jax.jit(sampler.sample)(jnp.asarray(random_logits(5)), KEYS, past, NONE, None)
        assert tokens.tolist() == [-1, -1, -1]

    def test_minus_infinity_bans_a_token(self):
        logits = jnp.zeros((3, V)).at[:, 4].set(9.0)
        sampler = lj.Sampling.create(greedy=True, logit_bias=[{4: -math.inf}, {}, {4: -math.inf, 0: -1.0}])
        assert sampler.sample(logits, KEYS, None, NONE, None)[0].tolist() == [0, 4, 1]
