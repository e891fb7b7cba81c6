"""Scores of texts: log-probabilities, windows over long texts, perplexity and bits per byte."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import llorch_jax as lj
from llorch_jax.errors import NonFiniteError

GPT2 = lj.Tokenizer.gpt2()


@pytest.fixture(scope="module")
def model():
    """With a begin-of-text token."""
    return tiny.random_model(bos_token_id=tiny.END_OF_TEXT)


@pytest.fixture(scope="module")
def bare():
    """Without one."""
    return tiny.random_model()


def logprobs_in_window(model, ids, start):
    """float32 [P, V]: log-probabilities after each of the ids[start : start + P]."""
    size = model.config.n_positions
    window = np.zeros((1, size), np.int32)  # what is padded behind changes nothing before it
    found = ids[start : start + size]
    window[0, : len(found)] = found
    return np.asarray(jax.nn.log_softmax(lj.forward(model.params, model.config, window)[0], axis=-1))


def scored_one_by_one(model, ids, stride):
    """Each token in the first window that reaches it, windows beginning at multiples of the stride."""
    size, scores = model.config.n_positions, []
    for place in range(1, len(ids)):
        start = max(0, math.ceil((place - size) / stride)) * stride
        scores.append(logprobs_in_window(model, ids, start)[place - 1 - start, ids[place]])
    return scores


def test_equals_forward_with_a_begin_of_text(model):
    result = lj.score(model, "Once upon")
    ids = model.tokenizer.encode("Once upon")
    assert result.token_ids == ids
    expected = scored_one_by_one(model, [tiny.END_OF_TEXT, *ids], 1)
    np.testing.assert_allclose(result.logprobs, expected, rtol=1e-4, atol=1e-4)
    assert result.num_bytes == 9


def test_equals_forward_without_one(bare):
    result = lj.score(bare, "Once upon")
    ids = bare.tokenizer.encode("Once upon")
    assert result.token_ids == ids[1:]
    np.testing.assert_allclose(result.logprobs, scored_one_by_one(bare, ids, 1), rtol=1e-4, atol=1e-4)
    assert result.num_bytes == 8


@pytest.mark.parametrize("count", [63, 64, 65, 150])
@pytest.mark.parametrize("stride", [17, 32, 64, None])
def test_windows(model, count, stride):
    text = "".join(chr(97 + place * place % 26) for place in range(count))
    result = lj.score(model, text, stride=stride)
    ids = [tiny.END_OF_TEXT, *model.tokenizer.encode(text)]
    assert result.token_ids == ids[1:]
    expected = scored_one_by_one(model, ids, stride or 32)
    np.testing.assert_allclose(result.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_the_stride_matters_only_beyond_the_context(model):
    short, long = "a" * 60, "ab" * 60
    assert lj.score(model, short, stride=1).logprobs == lj.score(model, short, stride=64).logprobs
    fine, coarse = lj.score(model, long, stride=1), lj.score(model, long, stride=64)
    assert fine.logprobs[:64] == coarse.logprobs[:64]
    assert fine.logprobs[64:] != coarse.logprobs[64:]


def test_numbers_by_hand():
    result = lj.Score([1, 2, 3], [math.log(0.5), math.log(0.25), math.log(0.125)], 12)
    assert result.total == pytest.approx(-6 * math.log(2))
    assert result.perplexity == pytest.approx(4)  # two bits per token
    assert result.bits_per_byte == pytest.approx(0.5)
    assert lj.Score([1], [-1000.0], 1).perplexity == math.inf


def test_a_text_known_by_heart():
    model = tiny.reciting_model("abc")
    result = lj.score(model, "abc")
    # the logits are 10 times the normed one-hot position [64] for one token, and 0 for the 256 others
    peak = 10 * (1 - 1 / 64) / math.sqrt((1 / 64) * (63 / 64) + 1e-5)
    np.testing.assert_allclose(result.logprobs, [-math.log1p(256 * math.exp(-peak))] * 2, atol=1e-5)
    assert result.perplexity == pytest.approx(1)
    assert lj.score(model, "acb").perplexity > 1e9


def test_a_single_token(model):
    result = lj.score(model, "a")
    expected = logprobs_in_window(model, [tiny.END_OF_TEXT], 0)[0, model.tokenizer.encode("a")[0]]
    assert result.logprobs == pytest.approx([expected], abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(-result.logprobs[0]))


def test_bytes_of_an_unscored_first_token_do_not_count(bare):
    result = lj.score(bare, "é")  # two tokens, neither of them a character
    assert len(result.token_ids) == result.num_bytes == 1
    assert result.bits_per_byte == pytest.approx(-result.logprobs[0] / math.log(2))


@examples(50)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_of_tokens_are_those_of_the_text(text):
    assert sum(GPT2.num_bytes(id) for id in GPT2.encode(text)) == len(text.encode())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bare, value):
    broken = dataclasses.replace(
        bare, params=bare.params.replace(ln_f=jax.tree.map(lambda x: x * value, bare.params.ln_f))
    )
    with pytest.raises(NonFiniteError, match="check the weights"):
        lj.score(broken, "Once upon")
    with pytest.raises(NonFiniteError, match="check the weights"):
        lj.choices(broken, "Once", [" a", " bc"])


@pytest.mark.parametrize("stride", [0, -1, 65, "2", 2.0, [2]])
def test_impossible_strides(model, stride):
    with pytest.raises(
        lj.LlorchError, match=r"stride: expected a whole number in 1 \.\. 64, got " + re.escape(repr(stride))
    ):
        lj.score(model, "Once", stride=stride)


def test_nothing_to_score(model, bare):
    with pytest.raises(lj.TokenError, match="text: expected at least 1 tokens to score, got 0"):
        lj.score(model, "")
    with pytest.raises(lj.TokenError, match="text: expected at least 2 tokens to score, got 1"):
        lj.score(bare, "a")


def test_no_tokenizer(model):
    with pytest.raises(lj.ModelError, match="model tiny: expected a tokenizer, got none"):
        lj.score(dataclasses.replace(model, tokenizer=None), "Once")


def test_the_demo_model_and_its_card():
    card = (Path(lj.__file__).parent / "assets" / "demo" / "README.md").read_text("utf-8")
    (stated,) = re.findall(r"Held-out: ([0-9.]+) bits per byte", card)
    assert 1 < float(stated) < 3
    text = "Once upon a time there was a little girl who lived with her mother in a house near the forest."
    result = lj.score(lj.load("demo"), text)
    assert result.num_bytes == len(text)
    assert 0.3 < result.bits_per_byte < 3
    shuffled = " ".join(sorted(text.split()))
    assert lj.score(lj.load("demo"), shuffled).total < result.total - 20
