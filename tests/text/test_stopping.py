"""Stop strings, penalties, alternatives and mirostat, from the arrays to the text."""

import itertools

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import llorch_jax as lj
from llorch_jax.text.stopping import StopMatcher

MODEL = tiny.random_model()
PROMPT = np.array([[1, 2, 3, 4], [9, 8, 0, 0]], np.int32)
LENGTHS = [4, 2]


@given(
    st.text("ab", max_size=30),
    st.lists(st.integers(1, 4), max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_stream_gives_out_what_comes_before_the_first_stop(text, sizes, stops):
    matcher, out, rest = StopMatcher(tuple(stops)), "", text
    for size in [*sizes, *([1] * len(text))]:
        if matcher.found or not rest:
            break
        out += matcher.push(rest[:size])
        rest = rest[size:]
        assert not any(stop in out for stop in stops)
    if matcher.found is None:
        assert not any(stop in text for stop in stops)
        assert out + matcher.flush() == text
    else:
        assert text.startswith(out + matcher.found)
        assert not any(stop in (out + matcher.found)[:-1] for stop in stops)


class TestStopStrings:
    model = tiny.reciting_model("one two three")

    @pytest.mark.parametrize(
        ("stop", "text", "reason"),
        [
            ("two", "ne ", "two"),
            (["zzz", " t"], "ne", " t"),
            ("three!", "ne two three", 256),
            (None, "ne two three", 256),
        ],
    )
    def test_generate_and_stream(self, stop, text, reason):
        out = lj.generate(self.model, "o", 20, stop=stop)
        assert (out.text, out.finish_reason, out.stop_reason) == (text, "stop", reason)
        pieces = list(lj.stream(self.model, "o", 20, stop=stop))
        assert "".join(piece.text for piece in pieces) == text
        assert pieces[-1].stop_reason == reason
        assert [piece.token_id for piece in pieces] == out.token_ids
        assert len(out.logprobs) == len(out.token_ids)

    def test_nothing_withheld_is_lost_at_the_limit(self):
        out = lj.generate(self.model, "o", 4, stop="twice")
        assert (out.text, out.finish_reason, out.stop_reason) == ("ne t", "length", None)
        assert "".join(piece.text for piece in lj.stream(self.model, "o", 4, stop="twice")) == "ne t"

    def test_each_row_has_its_own_end(self):
        outs = lj.generate(self.model, ["o", "one two"], 20, stop="two")
        assert [out.text for out in outs] == ["ne ", " three"]
        assert [out.stop_reason for out in outs] == ["two", 256]

    def test_stop_ids(self):
        out = lj.generate(self.model, "o", 20, stop_ids=[ord("w") - ord("!")])
        assert out.stop_reason == out.token_ids[-1]
        assert out.finish_reason == "stop"

    def test_empty_stop_strings(self):
        with pytest.raises(lj.OptionError, match="stop: expected texts of one character"):
            lj.generate(self.model, "o", 4, stop="")


class TestLoops:
    @pytest.mark.parametrize("greedy", [True, False])
    def test_the_loop_is_the_stream_and_the_row_alone(self, greedy):
        settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "presence_penalty": 0.5, "min_p": 0.01}
        sampler, keys = lj.Sampling.create(greedy=greedy, **settings), jax.random.split(jax.random.key(3), 2)
        arguments = (MODEL.params, MODEL.config, PROMPT, 20)
        tokens, _ = lj.generate_tokens(*arguments, None, LENGTHS, sampler, keys)
        streamed = list(lj.stream_tokens(*arguments, None, LENGTHS, sampler, keys))
        np.testing.assert_array_equal(np.stack(streamed, 1), tokens)
        alone, _ = lj.generate_tokens(MODEL.params, MODEL.config, PROMPT[1:, :2], 20, None, None, sampler, keys[1:])
        np.testing.assert_array_equal(alone[0], tokens[1])

    def test_no_two_tokens_occur_twice_in_a_row(self):
        tokens, _ = lj.generate_tokens(
            MODEL.params,
            MODEL.config,
            PROMPT,
            40,
            None,
            LENGTHS,
            lj.Sampling.create(greedy=True, no_repeat_ngram_size=2),
        )
        for prompt, length, new in zip(PROMPT, LENGTHS, np.asarray(tokens), strict=True):
            row = [*prompt[:length].tolist(), *new.tolist()]
            pairs = list(itertools.pairwise(row))
            assert len(set(pairs)) == len(pairs)

    def test_mirostat_in_the_loop_and_the_stream(self):
        arguments = (MODEL.params, MODEL.config, PROMPT, 12, None, LENGTHS, lj.Mirostat.create(2.0), jax.random.key(0))
        tokens, _ = lj.generate_tokens(*arguments)
        np.testing.assert_array_equal(np.stack(list(lj.stream_tokens(*arguments)), 1), tokens)

    def test_the_history_outlives_a_reencoding(self):
        sampler = lj.Sampling.create(greedy=True, no_repeat_ngram_size=2)
        tokens, _ = lj.generate_tokens(
            MODEL.params, MODEL.config, PROMPT[:1], 100, None, None, sampler, overflow=lj.Reencode(2, 20)
        )
        row = [*PROMPT[0].tolist(), *tokens[0].tolist()]
        assert len(set(itertools.pairwise(row))) == len(row) - 1

    def test_a_session_remembers(self, tmp_path):
        sampler = lj.Sampling.create(greedy=True, no_repeat_ngram_size=2, bad_words=[[5, 6]])
        expected, _ = lj.generate_tokens(MODEL.params, MODEL.config, PROMPT, 14, None, LENGTHS, sampler)
        session = lj.Session.start(MODEL.params, MODEL.config, PROMPT, None, LENGTHS, sampler)
        first, session = session.generate(MODEL.params, MODEL.config, 6)
        lj.save_session(tmp_path / "s", session)
        second, _ = lj.load_session(tmp_path / "s").generate(MODEL.params, MODEL.config, 8)
        np.testing.assert_array_equal(np.concatenate([first, second], 1), expected)

    def test_changing_a_setting_compiles_nothing(self):
        run = lambda **given: lj.generate(MODEL, "ab", 5, **given)  # noqa: E731
        run(temperature=0.7, repetition_penalty=1.2, min_p=0.1, no_repeat_ngram_size=3)
        before = lj.compile_count()
        run(temperature=0.9, repetition_penalty=1.4, min_p=0.3, no_repeat_ngram_size=2)
        assert lj.compile_count() == before

    def test_ids_outside_the_vocabulary(self):
        with pytest.raises(lj.SamplerError, match=r"logit_bias: expected ids in 0 \.\. 256, got 257"):
            lj.generate(MODEL, "ab", 2, logit_bias={257: 1.0})


def test_top_logprobs():
    out = lj.generate(MODEL, "abc", 6, top_logprobs=3)
    pieces = list(lj.stream(MODEL, "abc", 6, top_logprobs=3))
    logits = lj.forward(MODEL.params, MODEL.config, [[*out.prompt_ids, *out.token_ids]])[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))[len(out.prompt_ids) - 1 : -1]
    assert out.top_logprobs is not None
    for step, (alternatives, piece) in enumerate(zip(out.top_logprobs, pieces, strict=True)):
        best = np.argsort(-logprobs[step], kind="stable")[:3]
        assert [id for id, _ in alternatives] == best.tolist()
        np.testing.assert_allclose([value for _, value in alternatives], logprobs[step][best], atol=1e-4)
        assert alternatives[0][0] == out.token_ids[step]
        assert [id for id, _ in piece.top_logprobs] == best.tolist()
    assert lj.generate(MODEL, "abc", 2).top_logprobs is None
    with pytest.raises(lj.OptionError, match=r"top_logprobs: expected 0 \.\. vocab_size=257, got 258"):
        lj.generate(MODEL, "abc", 2, top_logprobs=258)
