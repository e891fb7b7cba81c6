"""The superset of all settings: a row's tokens are those of its own sampler, and no setting compiles anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.sampling import History

VOCAB = 1500  # more than are sorted at first
ROWS = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.8, "temperature": 1.3},
    {"top_k": 300, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 3.0, "frequency_penalty": 0.5, "repeat_last_n": 6},
    {"dry_multiplier": 2.0, "dry_breakers": [3], "no_repeat_ngram_size": 2, "presence_penalty": 1.0},
    {"bad_words": [[2], [4, 1]], "logit_bias": {7: 6.0, 8: -np.inf}, "min_new_tokens": 9, "temperature": 0},
    {"forced_tokens": [None, None, 5]},
    {"typical_p": 0.6, "temperature": 0},
    {"top_k": 5000, "top_p": 0.5},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0001, "top_k": 50},
    {"dynatemp_range": 0.5, "temperature": 0.8, "top_n_sigma": 2.0, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
]
PAST = np.random.default_rng(2).integers(0, 9, (len(ROWS), 16), np.int32)
LOGITS = np.random.default_rng(1).normal(0, 2, (40, len(ROWS), VOCAB)).astype(np.float32)
LOGITS[:, :, :9] += 5  # so that what was said before is likely
EOS = np.tile(np.asarray([[2, -1]], np.int32), (len(ROWS), 1))


@jax.jit
def tokens_of(sampler, logits, keys, past):
    """int32 [N, R] for N steps' logits [N, R, V]."""
    return jax.lax.map(lambda step: sampler.sample(step[0], step[1], past, jnp.asarray(EOS), None)[0], (logits, keys))


def history(order):
    lengths = np.full(len(order), 12, np.int32)
    return History(jnp.asarray(PAST[order]), jnp.asarray(lengths), jnp.asarray(lengths - 2))


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), LOGITS.shape[:2])


@pytest.fixture(scope="module")
def alone(keys):
    """The tokens that each row's own sampler draws, int32 [N, R]."""
    expected = []
    for row, settings in enumerate(ROWS):
        sampler = lj.Sampling.create(**settings)
        past = jax.tree.map(lambda array, row=row: array[row : row + 1], history(range(len(ROWS))))
        choose = jax.jit(lambda sampler, x, key, past: sampler.sample(x, key, past, EOS[:1], None)[0])
        expected.append([int(choose(sampler, x[row : row + 1], key[row : row + 1], past)[0])
                         for x, key in zip(LOGITS, keys, strict=True)])  # fmt: skip
    return np.stack(expected, axis=1)


def test_each_row_equals_its_own_sampler_and_nothing_is_recompiled(keys, alone):
    compiled = tokens_of._cache_size()
    for shift in (0, 5):  # other settings in every row
        order = [(row + shift) % len(ROWS) for row in range(len(ROWS))]
        sampler = lj.Sampling.superset([ROWS[row] for row in order])
        got = tokens_of(sampler, LOGITS[:, order], keys[:, np.asarray(order)], history(order))
        np.testing.assert_array_equal(got, alone[:, order])
    neutral = lj.Sampling.superset([{"temperature": 0}] * len(ROWS))
    got = tokens_of(neutral, LOGITS, keys, history(range(len(ROWS))))
    np.testing.assert_array_equal(got, LOGITS.argmax(-1))
    assert tokens_of._cache_size() == compiled + 1


def test_settings_that_are_off_in_some_rows_change_nothing_there(keys, alone):
    rows = [0, 1, 2, 3]
    temperature = [ROWS[row].get("temperature", 1.0) for row in rows]
    sampler = lj.Sampling.create(temperature, top_k=[0, -1, 20, 0], top_p=[1, 1, 1, 0.8], typical_p=[1, 1, 1, 1.0])
    for step in range(8):
        got, _ = sampler.sample(LOGITS[step, rows], keys[step, np.asarray(rows)], None, EOS[rows], None)
        np.testing.assert_array_equal(got, alone[step, rows])


def test_room_for_ids_is_kept():
    many = lj.Sampling.superset([{"logit_bias": dict.fromkeys(range(40), 1.0), "bad_words": [[1, 2, 3, 4, 5]]}, {}])
    few = lj.Sampling.superset([{}, {"forced_tokens": [1] * 16}], like=many)
    assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)
    assert np.asarray(few.more["forced_tokens"]).tolist() == [[-1] * 16, [1] * 16]
    assert not np.any(np.asarray(few.more["bad_words"][1]))


def test_a_row_joins_a_running_loop_without_a_compilation():
    config = lj.GPT2Config(vocab_size=29, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    params = jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, lj.init_params(config, jax.random.key(0)))
    prompts = np.array([[1, 2, 3, 1, 2], [4, 5, 6, 7, 8]], np.int32)
    key = jax.random.split(jax.random.key(1), 2)

    def run(rows):
        sampler = lj.Sampling.superset(rows)
        return np.asarray(lj.generate_tokens(params, config, prompts, 12, sampler=sampler, key=key)[0])

    plain = run([{"temperature": 0}, {"temperature": 0}])
    np.testing.assert_array_equal(plain, lj.generate_tokens(params, config, prompts, 12)[0])
    compiled = lj.compile_count()
    settings = {"temperature": 0.9, "dry_multiplier": 1.5, "top_k": 8, "repetition_penalty": 1.3}
    joined = run([{"temperature": 0}, settings])
    assert lj.compile_count() == compiled
    np.testing.assert_array_equal(joined[0], plain[0])
    own, _ = lj.generate_tokens(params, config, prompts[1:], 12, sampler=lj.Sampling.create(**settings), key=key[1:])
    np.testing.assert_array_equal(joined[1], own[0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: expected settings for one row or more, got none"),
        ([{}, {"top_k": [3, 4]}], r"top_k: expected one value in rows\[1\], got several"),
        ([{"logit_bias": [{1: 2.0}, {}]}], r"logit_bias: expected one value in rows\[0\], got several"),
        ([{"min_p": 2}], "min_p: expected numbers from 0 up to 1, got 2"),
        ([{"topk": 2}], "topk: .* did you mean top_k"),
    ],
)
def test_impossible_rows_are_refused(rows, message):
    with pytest.raises(lj.SamplerError, match=message):
        lj.Sampling.superset(rows)
