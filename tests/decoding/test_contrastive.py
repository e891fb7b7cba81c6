"""Contrastive search equals a slow search in plain Python without a cache, on every cache."""

import jax
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.decoding.contrastive import contrastive_search
from llorch_jax.errors import SearchError
from llorch_jax.model import run

CONFIG = lj.GPT2Config(vocab_size=29, n_positions=32, n_embd=24, n_layer=1, n_head=2)
PROMPTS = np.random.default_rng(0).integers(0, 29, (2, 5), np.int32)
LENGTHS = np.array([5, 2], np.int32)
NEW, WIDTH, ALPHA = 12, 3, 0.5


@pytest.fixture(scope="module")
def params():
    flat = lj.init_params(CONFIG, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim == 2 else leaf, flat)


@pytest.fixture(scope="module")
def encode(params):
    """Hidden states [T, D] and probabilities [T, V] of a list of tokens."""

    @jax.jit
    def whole(tokens):
        out = run(params, CONFIG, tokens, None)
        return out.hidden[0], jax.nn.softmax(out.logits[0])

    def encoded(text):
        padded = np.zeros((1, CONFIG.n_positions), np.int32)
        padded[0, : len(text)] = text
        return [np.asarray(x, np.float64)[: len(text)] for x in whole(padded)]

    return encoded


def searched(encode, prompt, alpha, eos=()):
    """The new tokens by the paper's formula."""
    text = list(prompt)
    for _ in range(NEW):
        probabilities = encode(text)[1][-1]
        scores = {}
        for token in np.argsort(-probabilities)[:WIDTH].tolist():
            hidden = encode([*text, token])[0]
            hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
            scores[token] = (1 - alpha) * probabilities[token] - alpha * np.max(hidden[:-1] @ hidden[-1])
        text.append(max(scores, key=scores.get))
        if text[-1] in eos:
            break
    return text[len(prompt) :]


def search(params, **settings):
    settings = {"top_k": WIDTH, "penalty_alpha": ALPHA, "lengths": LENGTHS, **settings}
    return contrastive_search(params, CONFIG, PROMPTS, NEW, **settings)


CACHES = {
    "static": lambda: None,
    "dynamic": lambda: lj.DynamicCache.init(CONFIG, batch_size=2, initial=4),
    "rotating": lambda: lj.RotatingCache.init(CONFIG, batch_size=2, window=20),
    "paged": lambda: lj.PagedCache.init(CONFIG, batch_size=2, page_size=8, num_pages=18),
}


@pytest.mark.parametrize("cache", CACHES)
def test_equals_a_plain_search_on_every_cache(params, encode, cache):
    tokens, after = search(params, cache=CACHES[cache]())
    for prompt, length, row in zip(PROMPTS, LENGTHS, tokens, strict=True):
        assert np.asarray(row).tolist() == searched(encode, prompt[:length].tolist(), ALPHA)
    np.testing.assert_array_equal(after.lengths, LENGTHS + NEW)


def test_the_cache_holds_all_tokens(params, encode):
    tokens, cache = search(params)
    logits, _ = lj.decode_step(params, CONFIG, [7, 7], cache)
    for prompt, length, row, got in zip(PROMPTS, LENGTHS, tokens, logits, strict=True):
        expected = encode([*prompt[:length], *np.asarray(row), 7])[1][-1]
        np.testing.assert_allclose(jax.nn.softmax(got), expected, atol=1e-5)


def test_alpha_zero_is_greedy_and_a_greater_one_is_not(params):
    greedy, _ = lj.generate_tokens(params, CONFIG, PROMPTS, NEW, lengths=LENGTHS)
    np.testing.assert_array_equal(search(params, penalty_alpha=0.0)[0], greedy)
    assert not np.array_equal(search(params)[0], greedy)


def test_end_of_text(params, encode):
    plain, _ = search(params)
    eos = [int(plain[0, 4]), int(plain[1, 7])]
    tokens, cache = search(params, eos_id=eos)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        expected = searched(encode, prompt[:length].tolist(), ALPHA, eos)
        assert len(expected) < NEW
        assert np.asarray(tokens[row]).tolist() == expected + [eos[0]] * (NEW - len(expected))
        assert int(cache.lengths[row]) == length + len(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, r"top_k: expected a whole number in 1 \.\. 29, got 0"),
        ({"top_k": 30}, r"top_k: expected a whole number in 1 \.\. 29, got 30"),
        ({"penalty_alpha": 1.5}, "penalty_alpha: expected a finite number from 0 to 1, got 1.5"),
    ],
)
def test_impossible_settings_are_refused(params, settings, message):
    with pytest.raises(SearchError, match=message):
        search(params, **settings)


def test_no_new_tokens_are_refused(params):
    with pytest.raises(lj.CapacityError, match=r"max_new_tokens: expected a whole number in 1 \.\. 1073741824, got 0"):
        contrastive_search(params, CONFIG, PROMPTS, 0)
