"""Several samples of one prompt: those of a batch of equal prompts, after one prefill; and speculative generation."""

import numpy as np
import pytest
import tiny

import llorch_jax as lj
from llorch_jax.text import samples
from llorch_jax.text.samples import mean_logprob

SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 1, "num_kv_heads": 1}  # compiles in no time
SAMPLED = {"temperature": 0.7, "top_k": 50, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return tiny.random_model(**SMALL)


@pytest.fixture(scope="module")
def batch(model):
    return lj.generate(model, ["Once"] * 5, 10, **SAMPLED)


@pytest.mark.parametrize("cache", ["static", "paged:4"])
def test_are_the_rows_of_a_batch(model, batch, cache):
    found = lj.generate_n(model, "Once", 5, 10, cache=cache, **SAMPLED)
    assert [out.token_ids for out in found] == [out.token_ids for out in batch]
    assert [out.text for out in found] == [out.text for out in batch]
    assert len({tuple(out.token_ids) for out in found}) == 5
    np.testing.assert_allclose([out.logprobs for out in found], [out.logprobs for out in batch], atol=1e-4)


def test_several_prompts_have_the_samples_of_each_alone(model, batch):
    prompts = ["Once", "A fox", "x"]
    found = lj.generate_n(model, prompts, 5, 10, stop="zq", **{**SAMPLED, "seed": [3, 4, 5]})
    assert [len(group) for group in found] == [5, 5, 5]
    assert [out.token_ids for out in found[0]] == [out.token_ids for out in batch]
    for prompt, seed, group in zip(prompts[1:], (4, 5), found[1:], strict=True):
        alone = lj.generate_n(model, prompt, 5, 10, **{**SAMPLED, "seed": seed})
        assert [out.token_ids for out in group] == [out.token_ids for out in alone]
    repeated = lj.generate(model, [prompt for prompt in prompts for _ in range(5)], 10, **SAMPLED)
    together = lj.generate_n(model, prompts, 5, 10, **SAMPLED)
    assert [out.token_ids for group in together for out in group] == [out.token_ids for out in repeated]


def test_alternatives_of_samples_are_those_of_a_batch(model):
    found = lj.generate_n(model, "Once", 2, 4, top_logprobs=2, **SAMPLED)
    batch = lj.generate(model, ["Once"] * 2, 4, top_logprobs=2, **SAMPLED)
    ids = [[[id for id, _ in step] for step in out.top_logprobs] for out in (*found, *batch)]
    assert ids[:2] == ids[2:]


def test_the_prompt_is_prefilled_once(model, monkeypatch):
    rows = []
    real = samples.first_logits
    monkeypatch.setattr(samples, "first_logits", lambda *a: rows.append(a[2].tokens.shape[0]) or real(*a))
    lj.generate_n(model, "Once", 5, 10, **SAMPLED)
    assert rows == [1]


def test_the_best_have_the_greatest_mean_logprob(model, batch):
    found = lj.generate_n(model, "Once", 2, 10, best_of=5, **SAMPLED)
    expected = sorted(batch, key=mean_logprob, reverse=True)[:2]
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]
    assert mean_logprob(found[0]) == pytest.approx(np.mean(expected[0].logprobs), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, r"n: expected a whole number in 1 \.\. 4096, got 0"),
        ({"n": 10**9}, r"n: expected a whole number in 1 \.\. 4096, got 1000000000"),
        ({"max_tokens": 3}, "max_tokens: got an unknown option; expected max_new_tokens"),
        ({"top_logprobs": 1, "num_beams": 2}, "top_logprobs: expected none with beam search"),
        ({"n": 3, "best_of": 2}, r"best_of: expected a whole number in 3 \.\. 4096, got 2"),
        ({"temperature": 0}, "temperature: expected more than 0"),
    ],
)
def test_impossible_settings_are_refused(model, settings, message):
    with pytest.raises(lj.OptionError, match=message):
        lj.generate_n(model, "Once", **settings)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(lj.TokenError, match="got an empty text"):
        lj.generate_n(model, "")


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_speculative_generation_is_generation(model, settings):
    plain = lj.generate(model, "abcabcabc", 20, **settings)
    out, stats = lj.generate_speculative(model, "abcabcabc", 20, **settings)
    assert (out.text, out.token_ids, out.finish_reason) == (plain.text, plain.token_ids, plain.finish_reason)
    np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=1e-4)
    assert out.timings.new_tokens == stats.new_tokens[0] == 20


def test_speculative_generation_ends_with_the_text():
    reciting = tiny.reciting_model("abcabcabcabd!")
    out, stats = lj.generate_speculative(reciting, "ab", 40)
    assert (out.text, out.finish_reason) == ("cabcabcabd!", "stop")
    assert stats.new_tokens[0] == 12
    assert stats.accepted[0] > 4


def test_an_unknown_draft_is_refused(model):
    with pytest.raises(lj.DraftError, match="expected 'lookup', a Model or a Draft, got 'oracle'"):
        lj.generate_speculative(model, "a", draft="oracle")
