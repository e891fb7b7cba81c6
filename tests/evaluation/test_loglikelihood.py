"""Log-likelihoods of continuations equal those of each text alone, and tokens are split as evaluation harnesses do."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import llorch_jax as lj
from llorch_jax.evaluation.loglikelihood import encode_pair, score_continuations, score_pairs
from llorch_jax.text.vocabulary import known_ids

SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 1, "num_kv_heads": 1}  # compiles in no time
GPT2 = lj.Tokenizer.gpt2()


@pytest.fixture(scope="module")
def model():
    return tiny.random_model(bos_token_id=tiny.END_OF_TEXT, **SMALL)


def logprobs_of(model, ids):
    """float32 [P, V] after each of the ids, without a cache."""
    padded = np.zeros((1, model.config.n_positions), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(jax.nn.log_softmax(lj.forward(model.params, model.config, padded)[0], axis=-1))


def alone(model, prefix, continuation):
    """Log-probabilities of the continuation's ids, and whether all are the most likely, one text at a time."""
    found = logprobs_of(model, [*prefix, *continuation])[len(prefix) - 1 :]
    picked = [found[i, id] for i, id in enumerate(continuation)]
    return picked, all(found[i].argmax() == id for i, id in enumerate(continuation))


def test_equal_each_text_alone(model):
    texts = [" a", " bc", "", " a longer one", "d"] * 2
    texts[2] = texts[7] = "!"
    found = lj.choices(model, "Once upon", texts)
    prefix = model.tokenizer.encode("Once upon")
    for text, choice in zip(texts, found, strict=True):
        expected, _ = alone(model, prefix, model.tokenizer.encode(text))
        assert (choice.text, choice.token_ids) == (text, model.tokenizer.encode(text))
        np.testing.assert_allclose(choice.logprobs, expected, rtol=1e-4, atol=1e-4)
        assert choice.total == pytest.approx(sum(expected), rel=1e-4)
        assert choice.mean == pytest.approx(sum(expected) / len(expected), rel=1e-4)
        assert not choice.is_greedy


def test_what_greedy_decoding_writes_is_greedy(model):
    prefix = model.tokenizer.encode("Once")
    ids = np.asarray(lj.generate_tokens(model.params, model.config, [prefix], 5)[0])[0].tolist()
    others = [ids[:3], ids[:1], [*ids[:4], (ids[4] + 1) % 257], [(ids[0] + 1) % 257, *ids[1:]]]
    found = score_continuations(model.params, model.config, prefix, [ids, *others])
    assert [greedy for _, greedy in found] == [True, True, True, False, False]
    assert [len(logprobs) for logprobs, _ in found] == [5, 3, 1, 5, 5]


def test_greedy_decoding_writes_no_ids_that_the_tokenizer_lacks():
    wide = tiny.random_model(vocab_size=320, **SMALL)
    weights = wide.params.wte
    wide = dataclasses.replace(wide, params=wide.params.replace(wte=weights.at[257:].set(50 * weights[:63])))
    prefix = wide.tokenizer.encode("Once")
    tokens, _ = lj.generate_tokens(wide.params, wide.config, [prefix], 4)
    assert np.max(tokens) > 256
    ids = lj.generate(wide, "Once", 4).token_ids
    pairs = [(prefix, ids), (prefix, [*ids[:3], (ids[3] + 1) % 256])]
    allowed = known_ids(wide.tokenizer, 320)
    assert [greedy for _, greedy in score_pairs(wide.params, wide.config, pairs, allowed=allowed)] == [True, False]
    assert [greedy for _, greedy in score_pairs(wide.params, wide.config, pairs)] == [False, False]


def test_an_empty_prefix_stands_for_begin_of_text(model):
    (choice,) = lj.choices(model, "", ["Once"])
    np.testing.assert_allclose(choice.logprobs, lj.score(model, "Once").logprobs, rtol=1e-4, atol=1e-4)
    assert lj.choices(model, " ", ["x"])[0].token_ids == model.tokenizer.encode(" x")


@pytest.mark.parametrize(
    ("prefix", "continuation", "expected"),
    [
        ("Hello", " world", ("Hello", " world")),
        ("Hello ", "world", ("Hello", " world")),
        ("Hello\n", "world", ("Hello", "\nworld")),
        ("Hello", "ween", ("Hello", "elloween")),  # both together are "H" and "elloween": the harness' rule, too
    ],
)
def test_where_the_continuation_begins(prefix, continuation, expected):
    before, after = encode_pair(GPT2, prefix, continuation, 50256)
    assert (GPT2.decode(before), GPT2.decode(after)) == expected
    whole = GPT2.encode(prefix + continuation)
    assert after == whole[len(before) :]


def test_up_to_the_end_of_the_context(model):
    size = model.config.n_positions
    found = lj.choices(model, "a" * (size - 4), ["bcdef", "b"])
    assert len(found[0].logprobs) == 5
    ids = model.tokenizer.encode("a" * (size - 4) + "bcde")
    assert found[0].logprobs[-1] == pytest.approx(logprobs_of(model, ids)[-1, ord("f") - 33], abs=1e-3)
    with pytest.raises(lj.CapacityError, match="n_positions=64"):
        lj.choices(model, "a" * (size - 4), ["b", "bcdefg"])


@pytest.mark.parametrize(
    ("prefix", "continuations", "message"),
    [
        ("a", [], "continuations: expected a list of at least one text, got"),
        ("a", "bc", "continuations: expected a list of at least one text, got 'bc'"),
        ("a", 5, "continuations: expected a list of at least one text, got 5"),
        ("a", np.array(["b"]), "continuations: expected a list of at least one text, got array"),
        ("a", ["b", 5], r"continuations\[1\]: expected a text, got 5"),
        (None, ["b"], "prefix: expected a text, got None"),
        ("a", ["b", ""], r"continuations\[1\]: expected at least one token"),
    ],
)
def test_bad_input_is_refused(model, prefix, continuations, message):
    with pytest.raises(lj.TokenError, match=message):
        lj.choices(model, prefix, continuations)


def test_a_model_without_begin_of_text_needs_a_prefix():
    with pytest.raises(lj.TokenError, match="no begin-of-text token"):
        lj.choices(tiny.random_model(**SMALL), "", ["a"])
