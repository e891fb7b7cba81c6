"""Text in, text out: generate and stream."""

import dataclasses
import time

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples, some

import llorch_jax as lj

SAMPLED = {"temperature": 1.0, "top_k": 200, "top_p": 0.99}
TEXT = "a🎈漢é👩‍👩‍👧!"


@pytest.fixture(scope="module")
def model():
    return tiny.random_model()


@pytest.fixture(scope="module")
def reciting():
    return tiny.reciting_model(TEXT)


class TestGenerate:
    def test_equals_generate_tokens(self, model):
        out = lj.generate(model, "Once", max_new_tokens=20)
        ids = model.tokenizer.encode("Once")
        tokens, _ = lj.generate_tokens(model.params, model.config, [ids], 20)
        assert (out.prompt_ids, out.token_ids) == (ids, tokens[0].tolist())
        assert out.text == model.tokenizer.decode(tokens[0])
        assert out.finish_reason == "length"

    def test_sampling_equals_generate_tokens_with_the_seeds_key(self, model):
        out = lj.generate(model, "Once", max_new_tokens=20, seed=7, **SAMPLED)
        sampler, key = lj.Sampling.create(**SAMPLED), jax.random.key(7)
        tokens, _ = lj.generate_tokens(
            model.params, model.config, [model.tokenizer.encode("Once")], 20, sampler=sampler, key=key
        )
        assert out.token_ids == tokens[0].tolist()

    def test_begins_with_the_tokens_that_the_tokenizer_puts_before_a_text(self, model):
        backend = tokenizers.Tokenizer.from_str(model.tokenizer.to_json())
        first = [("<|endoftext|>", tiny.END_OF_TEXT)]
        backend.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, first)
        out = lj.generate(dataclasses.replace(model, tokenizer=lj.Tokenizer(backend)), "Once", max_new_tokens=20)
        assert out.prompt_ids == [tiny.END_OF_TEXT, *model.tokenizer.encode("Once")]
        tokens, _ = lj.generate_tokens(model.params, model.config, [out.prompt_ids], 20)
        assert out.token_ids == tokens[0].tolist()

    @pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
    def test_a_row_of_a_batch_is_that_prompt_alone(self, model, settings):
        prompts = ["Once upon", "A", "xyz"]
        batch = lj.generate(model, prompts, max_new_tokens=12, seed=3, **settings)
        assert batch[0].token_ids == lj.generate(model, prompts[0], max_new_tokens=12, seed=3, **settings).token_ids
        sampler = lj.Sampling.create(**settings) if settings else lj.Greedy()
        for row, (prompt, out) in enumerate(zip(prompts, batch, strict=True)):
            ids, keys = model.tokenizer.encode(prompt), jax.random.fold_in(jax.random.key(3), row)[None]
            alone, _ = lj.generate_tokens(model.params, model.config, [ids], 12, sampler=sampler, key=keys)
            assert (out.prompt_ids, out.token_ids) == (ids, alone[0].tolist())

    def test_equal_prompts_of_a_batch_get_draws_of_their_own(self, model):
        first, second = lj.generate(model, ["Once", "Once"], max_new_tokens=20, **SAMPLED)
        assert first.token_ids != second.token_ids

    def test_a_list_of_one_and_a_tuple(self, model):
        single = lj.generate(model, "Once", max_new_tokens=20)
        for prompts in (["Once"], ("Once",)):
            (out,) = lj.generate(model, prompts, max_new_tokens=20)
            assert out.token_ids == single.token_ids

    def test_seeds(self, model):
        def ids(seed):
            return lj.generate(model, "Once", max_new_tokens=20, seed=seed, **SAMPLED).token_ids

        assert ids(1) == ids(1) == ids(np.int64(1)) == ids(2**80 + 1)
        assert len({tuple(ids(seed)) for seed in (0, 1, 2, -1)}) == 4

    def test_temperature_0_ignores_the_seed(self, model):
        first, second = (lj.generate(model, "Once", max_new_tokens=20, seed=seed) for seed in (0, 1))
        assert first.token_ids == second.token_ids

    @pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
    def test_logprobs_are_the_models(self, model, settings):
        out = lj.generate(model, "Once", max_new_tokens=20, **settings)
        ids = out.prompt_ids + out.token_ids
        logprobs = jax.nn.log_softmax(lj.forward(model.params, model.config, [ids])[0, :-1], axis=-1)
        expected = [float(logprobs[place, ids[place + 1]]) for place in range(len(out.prompt_ids) - 1, len(ids) - 1)]
        np.testing.assert_allclose(out.logprobs, expected, rtol=1e-4, atol=1e-4)

    def test_the_context_can_be_filled_and_not_exceeded(self, model):
        out = lj.generate(model, "0123456789" * 6, max_new_tokens=5)
        assert len(out.token_ids) == 5
        with pytest.raises(lj.CapacityError, match="n_positions=64 per row, got 65"):
            lj.generate(model, "0123456789" * 6, max_new_tokens=6)


class TestEndOfText:
    def test_stops(self, reciting):
        out = lj.generate(reciting, "a🎈", max_new_tokens=50)
        assert out.text == TEXT.removeprefix("a🎈")
        assert out.finish_reason == "stop"
        assert out.token_ids == [*reciting.tokenizer.encode(out.text), tiny.END_OF_TEXT]
        assert len(out.logprobs) == len(out.token_ids) == out.timings.new_tokens

    def test_at_the_last_token_asked_for(self, reciting):
        count = len(reciting.tokenizer.encode(TEXT)) + 1
        whole = lj.generate(reciting, "a", max_new_tokens=count - 1)
        assert (whole.text, whole.finish_reason) == (TEXT[1:], "stop")
        short = lj.generate(reciting, "a", max_new_tokens=count - 2)
        assert (short.text, short.finish_reason) == (TEXT[1:], "length")

    def test_as_the_first_token(self, reciting):
        out = lj.generate(reciting, TEXT, max_new_tokens=5)
        assert (out.text, out.token_ids, out.finish_reason) == ("", [tiny.END_OF_TEXT], "stop")
        (piece,) = lj.stream(reciting, TEXT, max_new_tokens=5)
        assert (piece.text, piece.token_id, piece.finish_reason) == ("", tiny.END_OF_TEXT, "stop")

    def test_rows_end_at_their_own(self, reciting):
        late, early, never = lj.generate(reciting, ["a", TEXT[:-1], "b" * 40], max_new_tokens=10)
        assert (late.finish_reason, early.finish_reason, never.finish_reason) == ("length", "stop", "length")
        assert (early.text, len(early.token_ids), len(early.logprobs)) == ("!", 2, 2)
        assert len(late.token_ids) == len(never.token_ids) == 10

    def test_any_of_the_models_ids_will_do(self, reciting):
        first = reciting.tokenizer.encode(TEXT[1])[2]
        several = dataclasses.replace(reciting.config, eos_token_id=(tiny.END_OF_TEXT, first))
        model = dataclasses.replace(reciting, config=several)
        out = lj.generate(model, TEXT[0], max_new_tokens=10)
        assert (len(out.token_ids), out.stop_reason) == (3, first)
        pieces = list(lj.stream(model, TEXT[0], max_new_tokens=10))
        assert (len(pieces), pieces[-1].stop_reason) == (3, first)
        out = lj.generate(model, TEXT[:-1], max_new_tokens=10)
        assert (out.text, out.stop_reason) == ("!", tiny.END_OF_TEXT)

    def test_a_model_without_one_goes_on(self, reciting):
        endless = dataclasses.replace(reciting, config=dataclasses.replace(reciting.config, eos_token_id=None))
        out = lj.generate(endless, TEXT[:-1], max_new_tokens=5)
        assert (out.finish_reason, len(out.token_ids)) == ("length", 5)
        assert out.text.startswith("!<|endoftext|>")


class TestStream:
    @examples(15)
    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), st.integers(0, 99), st.booleans())
    def test_equals_generate(self, model, prompt, seed, greedy):
        arguments = {"max_new_tokens": 20, "seed": seed, **({} if greedy else SAMPLED)}
        out, pieces = lj.generate(model, prompt, **arguments), list(lj.stream(model, prompt, **arguments))
        assert "".join(piece.text for piece in pieces) == out.text  # mostly bytes that are no UTF-8
        assert [piece.token_id for piece in pieces] == out.token_ids
        assert [piece.finish_reason for piece in pieces] == [None] * 19 + ["length"]
        np.testing.assert_allclose([piece.logprob for piece in pieces], out.logprobs, rtol=1e-4, atol=1e-4)

    def test_never_half_a_character(self, reciting):
        pieces = list(lj.stream(reciting, "a", max_new_tokens=60))
        assert [piece.text for piece in pieces if piece.text] == list(TEXT[1:])
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]

    def test_what_is_incomplete_at_the_end_is_shown_there(self, reciting):
        *_, last = lj.stream(reciting, "a", max_new_tokens=3)  # three of the balloon's four bytes
        assert (last.text, last.finish_reason) == ("\ufffd", "length")
        assert lj.generate(reciting, "a", max_new_tokens=3).text == "\ufffd"

    def test_a_prompt_may_end_within_a_word(self, reciting):
        assert "".join(piece.text for piece in lj.stream(reciting, TEXT[:3], max_new_tokens=50)) == TEXT[3:]

    def test_two_streams_at_once(self, model):
        alone = [piece.token_id for piece in lj.stream(model, "Once", max_new_tokens=10, **SAMPLED)]
        both = zip(*(lj.stream(model, "Once", max_new_tokens=10, **SAMPLED) for _ in range(2)), strict=True)
        assert [(a.token_id, b.token_id) for a, b in both] == [(id, id) for id in alone]


class TestTimings:
    def test_compiling_is_told_apart_and_done_once(self, model):
        fresh = dataclasses.replace(model, config=dataclasses.replace(model.config, n_positions=63))
        before = time.perf_counter()
        first = lj.generate(fresh, "Once", max_new_tokens=10).timings
        elapsed = time.perf_counter() - before
        second = lj.generate(fresh, "On", max_new_tokens=9).timings
        assert 0 < first.compile < elapsed
        assert first.compile + first.prefill + first.decode < elapsed * 1.05
        assert second.compile == 0
        assert (first.new_tokens, second.new_tokens) == (10, 9)
        assert min(second.prefill, second.decode) > 0
        assert second.ms_per_token == pytest.approx(1000 * second.decode / 8)

    def test_a_stream_leaves_out_what_its_reader_does(self, model):
        list(lj.stream(model, "Once", max_new_tokens=4))
        pieces = lj.stream(model, "Once", max_new_tokens=4)
        time.sleep(0.5)
        for piece in pieces:  # noqa: B007 - the last is looked at below
            time.sleep(0.5)
        assert piece.timings.compile == 0
        assert 0 < piece.timings.prefill < 0.5
        assert 0 < piece.timings.decode < 0.5
        assert piece.timings.new_tokens == 4


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"prompt": ""}, lj.TokenError, "at least one token, got an empty text"),
            ({"prompt": "a\ud800"}, lj.TokenError, "lone surrogate"),
            ({"max_new_tokens": 0}, lj.CapacityError, "max_new_tokens: .* got 0"),
            ({"max_new_tokens": 2.0}, lj.CapacityError, "max_new_tokens: .* got 2.0"),
            ({"max_new_tokens": 64}, lj.CapacityError, "n_positions=64 per row, got 67"),
            ({"temperature": -1}, lj.SamplerError, "temperature: .* got -1"),
            ({"top_k": -2}, lj.SamplerError, "top_k: .* got -2"),  # temperature 0 does not use it, but it is a mistake
            ({"top_p": 1.5}, lj.SamplerError, "top_p: .* got 1.5"),
            ({"temperature": 1.0, "top_p": -0.5}, lj.SamplerError, "top_p: .* got -0.5"),
            ({"seed": "1"}, lj.OptionError, "seed: expected a whole number, got '1'"),
            ({"seed": None}, lj.OptionError, "seed: .* got None"),
            ({"cache": "no such"}, lj.LlorchError, "cache: .*'no such'"),
        ],
    )
    def test_bad_arguments(self, model, change, error, message):
        arguments = {"prompt": "Once", "max_new_tokens": 4} | change
        with pytest.raises(error, match=message):
            lj.generate(model, **arguments)
        with pytest.raises(error, match=message):
            lj.stream(model, **arguments)  # at the call, not at the first piece

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            (["Once", ""], "prompt 1: .*empty text"),
            ([], "prompt: expected a text or a list of texts, got none"),
            (None, "prompt: .*, got NoneType"),
            (b"Once", "prompt: .*, got bytes"),
            (["Once", 5], "text: expected a str, got int"),
        ],
    )
    def test_bad_prompts(self, model, prompts, message):
        with pytest.raises(lj.TokenError, match=message):
            lj.generate(model, prompts)

    def test_a_stream_takes_one_prompt(self, model):
        with pytest.raises(lj.TokenError, match="expected a str, got list"):
            lj.stream(model, ["Once"])

    def test_no_tokenizer(self, model):
        bare = dataclasses.replace(model, tokenizer=None)
        for call in (lj.generate, lj.stream):
            with pytest.raises(lj.ModelError, match="model tiny: expected a tokenizer, got none; use generate_tokens"):
                call(bare, "Once")

    def test_a_tokenizer_with_more_tokens_than_the_model(self, model):
        small = dataclasses.replace(model, tokenizer=lj.Tokenizer.gpt2())
        with pytest.raises(lj.TokenError, match=r"tokens\[0, 0\]: expected an id in 0 \.\. 256"):
            lj.generate(small, "Once upon a time")


def test_the_demo_model():
    model = lj.load("demo")
    out = lj.generate(model, "Once upon a time", max_new_tokens=24)
    assert out.text.count(" ") >= 10  # words, and not the noise of random weights
    assert np.mean(out.logprobs) > -3


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1}])
def test_the_same_seed_gives_the_same_text_everywhere(short_demo, settings):
    model = lj.load(short_demo)
    prompts, seeds, asked = (
        ["The king", "Once upon a time there was", "A"],
        [5, 6, 7],
        {"max_new_tokens": 20, **settings},
    )
    alone = [
        lj.generate(model, prompt, seed=seed, **asked).token_ids for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        batch = lj.generate(model, [prompts[i] for i in order], seed=[seeds[i] for i in order], **asked)
        assert [out.token_ids for out in batch] == [alone[i] for i in order]
    for cache in some(("static", "dynamic", "paged:8", "rotating:64", "h2o:64"), 2):
        pieces = list(lj.stream(model, prompts[1], seed=seeds[1], cache=cache, **asked))
        assert [piece.token_id for piece in pieces] == alone[1]
