"""Beam search: transformers' results, and those of a slow search in plain Python without a cache."""

import jax
import numpy as np
import pytest
import references

import llorch_jax as lj
from llorch_jax.decoding.beam import beam_search
from llorch_jax.errors import SearchError

CONFIG = lj.GPT2Config(vocab_size=11, n_positions=32, n_embd=16, n_layer=1, n_head=2)
PROMPTS = np.random.default_rng(0).integers(0, 11, (2, 4), np.int32)
LENGTHS = np.array([4, 2], np.int32)
NEW, BEAMS = 8, 4
EOS = [2, 5]


@pytest.fixture(scope="module")
def params():
    flat = lj.init_params(CONFIG, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, flat)


def next_logprobs(params, text):
    """float64 [V] after a list of tokens."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(text)] = text
    logits = np.asarray(lj.forward(params, CONFIG, padded)[0, len(text) - 1], np.float64)
    return logits - np.log(np.sum(np.exp(logits)))


def searched(params, prompt, *, eos=(), groups=1, diversity=0.0, penalty=1.0, stopping=False):
    """The finished (score, new tokens) of a beam search by sorting lists, best first."""
    size = BEAMS // groups
    running = [[(0.0, [])] for _ in range(groups)]
    ended, is_open = [[] for _ in range(groups)], [True] * groups
    for count in range(1, NEW + 1):
        if not any(is_open):
            break
        used = np.zeros(CONFIG.vocab_size)
        for group in range(groups):
            grown = [
                (score + logprob - diversity * used[token], [*new, token])
                for score, new in running[group]
                for token, logprob in enumerate(next_logprobs(params, [*prompt, *new]))
            ]
            grown.sort(key=lambda pair: -pair[0])
            done = [pair for pair in grown[:size] if pair[1][-1] in eos or count == NEW]
            if is_open[group]:
                ended[group] += [(score / count**penalty, new) for score, new in done]
                ended[group] = sorted(ended[group], key=lambda pair: -pair[0])[:size]
            running[group] = [pair for pair in grown if pair[1][-1] not in eos][:size]
            if is_open[group]:
                stopped = [pair for pair in grown[:size] if pair[1][-1] in eos]
                np.add.at(used, [new[-1] for _, new in stopped + running[group]], 1)
            best = running[group][0][0] / (NEW if stopping == "never" and penalty > 0 else count) ** penalty
            full = len(ended[group]) == size
            is_open[group] &= not full or (stopping is not True and best > ended[group][-1][0])
    return sorted((pair for group in ended for pair in group), key=lambda pair: -pair[0])


def check(params, beams, **settings):
    """Compares with the plain search, row by row."""
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        expected = searched(params, prompt[:length].tolist(), **settings)
        found = [new[:n].tolist() for new, n in zip(beams.tokens[row], beams.lengths[row], strict=True)]
        assert found == [new for _, new in expected]
        np.testing.assert_allclose(beams.scores[row], [score for score, _ in expected], rtol=1e-4)


def search(params, **settings):
    settings = {"num_beams": BEAMS, "num_return": BEAMS, "lengths": LENGTHS, "eos_id": EOS, **settings}
    return beam_search(params, CONFIG, PROMPTS, NEW, **settings)


def test_equals_transformers(tmp_path):
    about, data = references.sidecar("beam"), references.arrays("beam")
    given = about["parameters"]
    model = references.load_synthesised(given["config"], given["seed"], about["weights_sha256"], tmp_path)
    count, beams = given["new_tokens"], given["num_beams"]
    found = beam_search(model.params, model.config, data["prompts"], count, num_beams=beams, num_return=beams)
    np.testing.assert_array_equal(found.tokens, data["sequences"][:, :, -count:])
    np.testing.assert_allclose(found.scores, data["scores"], rtol=0, atol=1e-5)
    assert np.all(found.lengths == count)


@pytest.mark.parametrize("stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
def test_equals_a_plain_search(params, stopping, penalty):
    beams = search(params, length_penalty=penalty, early_stopping=stopping)
    check(params, beams, eos=EOS, penalty=penalty, stopping=stopping)


def test_the_settings_matter(params):
    """So that the comparisons above mean something."""
    found = [search(params, length_penalty=penalty, early_stopping=stopping).tokens.tolist()
             for penalty, stopping in ((0.0, False), (3.0, False), (3.0, True), (3.0, "never"))]  # fmt: skip
    assert found[0] != found[1]
    assert found[1] != found[2]
    lengths = search(params, length_penalty=0.0).lengths
    assert lengths.min() < NEW


@pytest.mark.parametrize("penalty", [-13.0, 13.0])
def test_scores_of_extreme_penalties_do_not_overflow(params, penalty):
    check(params, search(params, length_penalty=penalty), eos=EOS, penalty=penalty)


@pytest.mark.parametrize("groups", [2, 4])
def test_diverse_search_equals_a_plain_one(params, groups):
    beams = search(params, num_beam_groups=groups, diversity_penalty=2.0)
    check(params, beams, eos=EOS, groups=groups, diversity=2.0)
    first = {new[0] for new in beams.tokens[0].tolist()}
    assert len(first) > 1


CACHES = {
    "dynamic": lambda: lj.DynamicCache.init(CONFIG, batch_size=2, initial=4),
    "rotating": lambda: lj.RotatingCache.init(CONFIG, batch_size=2, window=16),
    "paged": lambda: lj.PagedCache.init(CONFIG, batch_size=2, page_size=4, num_pages=24),
    "int8": lambda: lj.QuantizedCache.init(CONFIG, batch_size=2, bits=8),
}


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache(params, cache):
    static, beams = search(params), search(params, cache=CACHES[cache]())
    np.testing.assert_array_equal(beams.tokens, static.tokens)
    np.testing.assert_allclose(beams.scores, static.scores, rtol=1e-4)


def test_too_few_pages_are_refused(params):
    """The prompts' pages are shared by their beams; where pages for the rest are missing, the error says so."""
    cache = lj.PagedCache.init(CONFIG, batch_size=2, page_size=4, num_pages=6)
    with pytest.raises(lj.CapacityError, match="pages of 4 tokens are needed"):
        search(params, cache=cache)


def test_one_beam_is_greedy(params):
    beams = beam_search(params, CONFIG, PROMPTS, NEW, num_beams=1, lengths=LENGTHS)
    tokens, _ = lj.generate_tokens(params, CONFIG, PROMPTS, NEW, lengths=LENGTHS)
    np.testing.assert_array_equal(beams.tokens[:, 0], tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, r"num_beams: expected a whole number in 1 \.\. 4096, got 0"),
        ({"num_beams": 10**9}, r"num_beams: expected a whole number in 1 \.\. 4096, got 1000000000"),
        ({"num_beams": 2.0}, "num_beams: expected a whole number"),
        ({"num_return": 5}, "at most num_beams=4, got 5"),
        ({"num_beam_groups": 3}, "a divisor of num_beams=4, got 3"),
        ({"length_penalty": float("nan")}, "length_penalty: expected a finite"),
        ({"length_penalty": 10**400}, "length_penalty: expected a finite"),
        ({"length_penalty": 1e39}, "length_penalty: expected a finite"),
        ({"length_penalty": -14.0}, "length_penalty: expected a number from -13 to 13 with 8 new tokens, got -14.0"),
        ({"num_beams": 12}, r"num_beams: expected a whole number in 1 \.\. 11, got 12"),
        ({"diversity_penalty": -1.0}, "diversity_penalty: expected"),
        ({"diversity_penalty": 1e39}, "diversity_penalty: expected"),
        ({"early_stopping": "soon"}, "early_stopping: expected True, False or 'never', got 'soon'"),
    ],
)
def test_impossible_settings_are_refused(params, settings, message):
    with pytest.raises(SearchError, match=message):
        search(params, **settings)
