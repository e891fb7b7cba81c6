"""Where rows end: by ids of their own, by numbers of their own, and what a row that has ended asks of the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.decoding.request import prepare
from llorch_jax.decoding.streaming import stream_steps

CONFIG = lj.GPT2Config(vocab_size=29, n_positions=16, n_embd=16, n_layer=1, n_head=2)
PROMPTS = np.array([[3, 1, 4, 1], [2, 7, 1, 8]], np.int32)


def sharp(config):
    params = lj.init_params(config, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, params)


@pytest.fixture(scope="module")
def params():
    return sharp(CONFIG)


@pytest.fixture(scope="module")
def free(params):
    """12 tokens per row that nothing ends."""
    return np.asarray(lj.generate_tokens(params, CONFIG, PROMPTS, 12)[0])


def cut(row, eos, count):
    """A row that ends at one of the ids or after `count` tokens, filled up as `generate_tokens` does."""
    ends = [place for place, token in enumerate(row) if token in eos]
    size = min(ends[0] + 1 if ends else len(row), count)
    return [*row[:size], *[eos[0] if eos else 0] * (len(row) - size)]


def last(stream):
    """What a stream returns in the end."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value


class TestIds:
    def test_those_of_the_configuration_end_rows_unless_others_or_none_are_given(self, params, free):
        eos = int(free[1, 2])
        ending = dataclasses.replace(CONFIG, eos_token_id=eos)
        expected = [cut(row.tolist(), [eos], 12) for row in free]
        assert expected != free.tolist()
        by_default, _ = lj.generate_tokens(params, ending, PROMPTS, 12)
        assert by_default.tolist() == expected
        guessed, _, _ = lj.speculate_tokens(params, ending, PROMPTS, 12)
        assert guessed.tolist() == expected
        session = lj.Session.start(params, ending, PROMPTS)
        assert session.generate(params, ending, 12)[0].tolist() == expected
        streamed = list(lj.stream_tokens(params, ending, PROMPTS[1:], 12))
        assert len(streamed) == expected[1].index(eos) + 1
        for never in (None, ()):
            assert lj.generate_tokens(params, ending, PROMPTS, 12, eos_id=never)[0].tolist() == free.tolist()

    def test_rows_have_ids_of_their_own(self, params, free):
        ids = [[int(free[0, 2])], [int(free[1, 5]), int(free[1, 7])]]
        tokens, cache = lj.generate_tokens(params, CONFIG, PROMPTS, 12, eos_id=ids)
        expected = [cut(row.tolist(), own, 12) for row, own in zip(free, ids, strict=True)]
        assert tokens.tolist() == expected
        ends = [min(expected[row].index(eos) for eos in ids[row] if eos in expected[row]) for row in range(2)]
        assert np.asarray(cache.lengths).tolist() == [4 + end for end in ends]

    @pytest.mark.parametrize(
        ("eos", "message"),
        [
            (29, r"eos_id: expected ids in 0 \.\. 28, got 29"),
            (2**70, "eos_id: expected ids"),
            (1.0, "eos_id: expected ids"),
            (True, "eos_id: expected ids"),
            ("never", "eos_id: expected ids, None or 'config', got 'never'"),
            ([[1], [2], [3]], "eos_id: expected ids for 2 rows, got 3 lists"),
        ],
    )
    def test_impossible_ids_are_refused(self, params, eos, message):
        with pytest.raises(lj.TokenError, match=message):
            lj.generate_tokens(params, CONFIG, PROMPTS, 2, eos_id=eos)


class TestNumbers:
    def test_rows_have_numbers_of_their_own(self, params, free):
        expected = [cut(row.tolist(), [], count) for row, count in zip(free, (3, 12), strict=True)]
        tokens, cache = lj.generate_tokens(params, CONFIG, PROMPTS, [3, 12])
        assert tokens.tolist() == expected
        assert np.asarray(cache.lengths).tolist() == [4 + 2, 4 + 11]
        stream = lj.stream_tokens(params, CONFIG, PROMPTS, (3, 12))
        assert np.stack(list(stream), 1).tolist() == expected
        guessed, after, stats = lj.speculate_tokens(params, CONFIG, PROMPTS, np.array([3, 12]))
        assert guessed.tolist() == expected
        assert np.asarray(after.lengths).tolist() == np.asarray(cache.lengths).tolist()
        assert stats.new_tokens.tolist() == [3, 12]

    def test_a_session_goes_on_from_where_each_row_is(self, params, free):
        session = lj.Session.start(params, CONFIG, PROMPTS)
        parts = []
        for counts in ([1, 4], [5, 1], [2, 3]):
            new, session = session.generate(params, CONFIG, counts)
            parts.append([row[:count].tolist() for row, count in zip(new, counts, strict=True)])
        assert [token for part in parts for token in part[0]] == free[0, :8].tolist()
        assert [token for part in parts for token in part[1]] == free[1, :8].tolist()
        assert np.asarray(session.counts).tolist() == [12, 12]

    @pytest.mark.parametrize("count", [2**31 + 1, 10**400, 2.0, "3", [3], [3, 0], True])
    def test_impossible_numbers_are_refused_in_one_line(self, params, count):
        session = lj.Session.start(params, CONFIG, PROMPTS)
        with pytest.raises(lj.CapacityError, match="max_new_tokens: expected") as refused:
            session.generate(params, CONFIG, count)
        assert len(str(refused.value)) < 200
        for overflow in ("error", "reencode"):
            with pytest.raises(lj.CapacityError, match="max_new_tokens: expected"):
                lj.generate_tokens(params, CONFIG, PROMPTS, count, overflow=overflow)

    def test_more_history_than_fits_memory_is_refused(self, params):
        sampler = lj.Sampling.create(greedy=True, repetition_penalty=1.2)
        with pytest.raises(lj.CapacityError, match=r"max_new_tokens: expected at most \d+ with .* got 1073741824"):
            lj.generate_tokens(params, CONFIG, PROMPTS, 2**30, sampler=sampler, overflow="reencode")


LAYOUTS = ["static", "dynamic", "rotating:15+1", "paged:4", "int8", "recent:16"]


class TestFullRows:
    """The first row fills the context and ends; the second goes on."""

    LENGTHS = (15, 2)

    def prompt(self):
        return np.random.default_rng(2).integers(0, 29, (2, 15), np.int32)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_full_row_that_has_ended_needs_no_room(self, params, layout):
        lengths = np.array(self.LENGTHS)
        alone, _ = lj.generate_tokens(
            params, CONFIG, self.prompt()[1:, :2], 14, lj.make_cache(CONFIG, layout, batch_size=1)
        )
        first, _ = lj.generate_tokens(params, CONFIG, self.prompt()[:1], 2)
        eos = int(first[0, 1])
        expected = cut(np.asarray(alone[0]).tolist(), [eos], 14)
        cache = lj.make_cache(CONFIG, layout, batch_size=2)
        session = lj.Session.start(params, CONFIG, self.prompt(), cache, lengths, eos_id=eos)
        parts = []
        for count in (2, 5, 7):
            new, session = session.generate(params, CONFIG, count)
            parts.append(np.asarray(new[1]))
        assert int(session.state.cache.lengths[0]) == CONFIG.n_positions
        assert np.concatenate(parts).tolist() == expected

    def test_a_loop_and_a_stream_go_on_too(self, params):
        lengths = np.array(self.LENGTHS)
        alone, _ = lj.generate_tokens(params, CONFIG, self.prompt()[1:, :2], 14)
        for layout in ("static", "paged:4"):
            common = {"lengths": lengths, "cache": lj.make_cache(CONFIG, layout, batch_size=2)}
            tokens, cache = lj.generate_tokens(params, CONFIG, self.prompt(), [2, 14], **common)
            assert tokens[1].tolist() == alone[0].tolist()
            common["cache"] = lj.make_cache(CONFIG, layout, batch_size=2)
            streamed = list(lj.stream_tokens(params, CONFIG, self.prompt(), [2, 14], **common))
            assert [int(token[1]) for token in streamed] == alone[0].tolist()
            assert np.asarray(cache.lengths).tolist() == [16, 15]

    def test_a_finished_long_row_makes_no_other_row_re_encode(self, params):
        tokens, lengths = self.prompt(), np.array(self.LENGTHS)
        alone, _ = lj.generate_tokens(params, CONFIG, tokens[1:, :2], 40, overflow="reencode")
        first, _ = lj.generate_tokens(params, CONFIG, tokens[:1], 2)
        eos = int(first[0, 1])
        expected = cut(np.asarray(alone[0]).tolist(), [eos], 40)

        def parts(tokens, lengths, **settings):
            request = prepare(CONFIG, tokens, 40, None, lengths, overflow="reencode", **settings)
            steps = list(stream_steps(params, CONFIG, request))
            return [int(step.token[-1]) for step in steps], steps[-1].part

        only, needed = parts(tokens[1:, :2], None, eos_id=eos)
        together, made = parts(tokens, lengths, eos_id=eos)
        assert together == only == expected[: len(only)]
        assert made <= needed + 1  # the long row's own context was full once


class TestNoTokens:
    def broken(self, params, value):
        wte = params.wte.at[5, 3].set(value)
        return params.replace(wte=wte)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_logits_that_are_no_numbers_are_an_error(self, params, value):
        broken = self.broken(params, value)
        message = "logits: expected finite numbers, got NaN or infinity"
        with pytest.raises(lj.NonFiniteError, match=message):
            lj.generate_tokens(broken, CONFIG, PROMPTS, 4)
        with pytest.raises(lj.NonFiniteError, match=message):
            list(lj.stream_tokens(broken, CONFIG, PROMPTS, 4, sampler=lj.Sampling.create(0.8), key=jax.random.key(0)))
        with pytest.raises(lj.NonFiniteError, match=message):
            lj.speculate_tokens(broken, CONFIG, PROMPTS, 4)
        with pytest.raises(lj.NonFiniteError, match=message):
            lj.Session.start(broken, CONFIG, PROMPTS)
        with pytest.raises(lj.NonFiniteError, match=message):
            lj.beam_search(broken, CONFIG, PROMPTS, 4, num_beams=2)
        with pytest.raises(lj.NonFiniteError, match=message):
            lj.contrastive_search(broken, CONFIG, PROMPTS, 4)

    def test_settings_that_ban_every_token_are_an_error(self, params):
        sampler = lj.Sampling.create(greedy=True, bad_words=[[[0]], [[id] for id in range(29)]])
        message = "sampler: expected settings that allow a token, got none for row 1: all are banned"
        with pytest.raises(lj.SamplerError, match=message):
            lj.generate_tokens(params, CONFIG, PROMPTS, 4, sampler=sampler)
        with pytest.raises(lj.SamplerError, match=message):
            lj.speculate_tokens(params, CONFIG, PROMPTS, 4, sampler=sampler)


class TestKeys:
    def test_a_raw_key_is_that_of_the_typed_one(self, params):
        sampler = lj.Sampling.create(1.0)
        typed, _ = lj.generate_tokens(params, CONFIG, PROMPTS, 9, sampler=sampler, key=jax.random.key(3))
        raw, _ = lj.generate_tokens(params, CONFIG, PROMPTS, 9, sampler=sampler, key=jax.random.PRNGKey(3))
        np.testing.assert_array_equal(raw, typed)
        rows = jnp.stack([jax.random.PRNGKey(1), jax.random.PRNGKey(2)])
        own = jnp.stack([jax.random.key(1), jax.random.key(2)])
        raw, _ = lj.generate_tokens(params, CONFIG, PROMPTS, 9, sampler=sampler, key=rows)
        typed, _ = lj.generate_tokens(params, CONFIG, PROMPTS, 9, sampler=sampler, key=own)
        np.testing.assert_array_equal(raw, typed)

    @pytest.mark.parametrize("key", [3, "3", np.zeros(3, np.uint32), jax.random.split(jax.random.key(0), 3)])
    def test_what_is_no_key_is_refused(self, params, key):
        with pytest.raises(lj.SamplerError, match="key: expected"):
            lj.generate_tokens(params, CONFIG, PROMPTS, 2, sampler=lj.Sampling.create(1.0), key=key)


def test_what_is_no_sampler_is_refused(params):
    for wrong in (lj.Greedy, lambda logits, keys: 0, 3):
        with pytest.raises(lj.SamplerError, match="sampler: expected an object with needs_key, needs_history"):
            lj.generate_tokens(params, CONFIG, PROMPTS, 2, sampler=wrong)


def test_representations_print_no_arrays(params):
    session = lj.Session.start(params, CONFIG, PROMPTS)
    assert repr(session) == "Session(2 rows of up to 4 tokens, DecodeState(2 rows, cache DynamicCache))"
    assert "Array" not in repr(session.decoding)
    assert "Array" not in repr(lj.Mirostat.create([3.0, 4.0]))
