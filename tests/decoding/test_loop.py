"""Prefill, decode step and loops: exact, in place, and compiled once per bucket."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import assert_close
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import llorch_jax as lj
from llorch_jax.decoding import steps
from llorch_jax.decoding.params import DecodingParams

CONFIG = lj.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def params():
    sharp = lj.init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, sharp)  # clear choices, uneven attention


def prompts(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length), np.int32)


def pointers(cache):
    return [leaf.unsafe_buffer_pointer() for leaf in (*cache.keys, *cache.values)]


def final_cache(stream):
    """Runs a stream to its end and returns what it returns."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value


class TestInPlace:
    def test_buffers_stay_where_they_are(self, params):
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=48)
        before = pointers(cache)
        _, cache = lj.prefill(params, CONFIG, prompts(2, 5), cache)
        for token in (3, 4, 5):
            _, cache = lj.decode_step(params, CONFIG, np.full(2, token, np.int32), cache)
        _, cache = lj.generate_tokens(params, CONFIG, prompts(2, 3), 9, cache=cache)
        cache = final_cache(lj.stream_tokens(params, CONFIG, prompts(2, 3), 5, cache=cache))
        assert pointers(cache) == before
        np.testing.assert_array_equal(cache.lengths, [5 + 3 + 3 + 8 + 3 + 4] * 2)

    def test_a_donated_cache_is_gone_and_forward_leaves_its_own(self, params):
        cache = lj.StaticCache.init(CONFIG, batch_size=1, capacity=32)
        lj.forward(params, CONFIG, prompts(1, 4), cache=cache)
        assert int(cache.lengths[0]) == 0
        lj.prefill(params, CONFIG, prompts(1, 4), cache)
        with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
            np.asarray(cache.keys[0])

    @pytest.mark.parametrize("batch", [1, 3])
    def test_compiled_programs_copy_no_cache(self, params, batch):
        cache = lj.StaticCache.init(CONFIG, batch_size=batch, capacity=48)
        token = jnp.zeros(batch, jnp.int32)
        keys = jax.random.split(jax.random.key(0), batch)
        decoding = DecodingParams(lj.Greedy(), keys, jnp.zeros((batch, 1), jnp.int32))
        state = steps.DecodeState(token, jnp.zeros(batch, jnp.float32), token > 0, token + 9, cache)
        out = steps.Generated(jnp.zeros((batch, 16), jnp.int32), jnp.zeros((batch, 16), jnp.float32))
        programs = [
            steps.prefill_step.lower(params, CONFIG, jnp.zeros((batch, 16), jnp.int32), token + 16, cache, fresh=True),
            steps.decode.lower(params, CONFIG, token, cache),
            steps.loop.lower(params, CONFIG, decoding, out, state, jnp.zeros(2, jnp.int32)),
        ]
        buffer = re.escape(f"f32[{batch},2,48,8]")
        for program in programs:
            text = program.compile().as_text()
            assert re.search(buffer, text), "the test looks for the wrong shape"
            assert not re.findall(rf"= {buffer}\S* copy\(", text)


class TestCompilations:
    def test_another_length_in_the_bucket_compiles_nothing(self, params):
        def run(length, new_tokens, temperature):
            sampler = lj.Sampling.create(temperature, top_k=40)
            cache = lj.StaticCache.init(CONFIG, batch_size=1, capacity=60)
            lj.generate_tokens(params, CONFIG, prompts(1, length), new_tokens, cache, sampler=sampler, key=KEY)

        run(17, 20, 0.7)
        count = lj.compile_count()
        run(24, 18, 1.3)
        run(19, 23, 0.9)
        assert lj.compile_count() == count
        run(25, 20, 0.7)
        assert lj.compile_count() == count + 1  # the prefill of the next bucket of prompts

    def test_default_caches_share_buckets(self, params):
        lj.generate_tokens(params, CONFIG, prompts(1, 9), 10)
        count = lj.compile_count()
        lj.generate_tokens(params, CONFIG, prompts(1, 12), 12)
        assert lj.compile_count() == count


KEY = jax.random.key(5)


class TestLoops:
    @examples(30)
    @given(
        st.lists(st.integers(1, 12), min_size=1, max_size=3),
        st.integers(1, 10),
        st.sampled_from(["greedy", "sampled"]),
        st.integers(0, 2**31),
    )
    def test_stream_equals_loop_equals_rows_alone(self, params, lengths, count, kind, seed):
        sampler = lj.Greedy() if kind == "greedy" else lj.Sampling.create(1.1, top_k=30, top_p=0.95)
        tokens = prompts(len(lengths), 12, seed)
        keys = jax.random.split(jax.random.key(seed), len(lengths))
        common = {"sampler": sampler, "eos_id": 7}
        batch, cache = lj.generate_tokens(params, CONFIG, tokens, count, lengths=lengths, key=keys, **common)
        streamed = list(lj.stream_tokens(params, CONFIG, tokens, count, lengths=lengths, key=keys, **common))
        np.testing.assert_array_equal(np.stack(streamed, 1), batch[:, : len(streamed)])
        assert np.all(batch[:, len(streamed) :] == 7)
        for row, length in enumerate(lengths):
            alone, own = lj.generate_tokens(
                params, CONFIG, tokens[row : row + 1, :length], count, key=keys[row : row + 1], **common
            )
            np.testing.assert_array_equal(alone[0], batch[row])
            assert int(own.lengths[0]) == int(cache.lengths[row])

    def test_greedy_equals_argmax_of_forward(self, params):
        tokens = prompts(2, 6)
        generated, _ = lj.generate_tokens(params, CONFIG, tokens, 12)
        for _ in range(12):
            best = jnp.argmax(lj.forward(params, CONFIG, tokens)[:, -1], -1)
            tokens = np.concatenate([tokens, np.asarray(best, np.int32)[:, None]], 1)
        np.testing.assert_array_equal(generated, tokens[:, 6:])

    def test_a_row_ends_at_its_end_of_text(self, params):
        tokens = prompts(3, 6)
        free, _ = lj.generate_tokens(params, CONFIG, tokens, 12)
        eos = int(free[1, 4])
        stopped, cache = lj.generate_tokens(params, CONFIG, tokens, 12, eos_id=[eos])
        for row in range(3):
            ends = np.flatnonzero(np.asarray(free[row]) == eos)
            end = int(ends[0]) if ends.size else 11
            np.testing.assert_array_equal(stopped[row, : end + 1], free[row, : end + 1])
            assert np.all(np.asarray(stopped[row, end + 1 :]) == eos)
            assert int(cache.lengths[row]) == 6 + end

    def test_continuing_equals_one_generation(self, params):
        tokens = prompts(2, 6)
        whole, _ = lj.generate_tokens(params, CONFIG, tokens, 20)
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=40)
        first, cache = lj.generate_tokens(params, CONFIG, tokens, 8, cache=cache)
        second, _ = lj.generate_tokens(params, CONFIG, first[:, -1:], 12, cache=cache)
        np.testing.assert_array_equal(np.concatenate([first, second], 1), whole)

    def test_same_key_same_tokens_and_another_key_others(self, params):
        def draw(key):
            return lj.generate_tokens(params, CONFIG, prompts(2, 4), 20, sampler=lj.Sampling.create(1.0), key=key)[0]

        np.testing.assert_array_equal(draw(KEY), draw(jax.random.key(5)))
        assert not np.array_equal(draw(KEY), draw(jax.random.key(6)))

    def test_all_of_it_works_inside_jit(self, params):
        @jax.jit
        def run(params, tokens, lengths):
            cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=32)
            logits, cache = lj.prefill(params, CONFIG, tokens, cache, lengths)
            logits, cache = lj.decode_step(params, CONFIG, jnp.argmax(logits, -1), cache)
            plain = lj.forward(params, CONFIG, tokens)
            return logits, plain, lj.generate_tokens(params, CONFIG, tokens, 9, lengths=lengths, eos_id=7)[0]

        tokens, lengths = prompts(2, 6), np.array([6, 4], np.int32)
        logits, plain, generated = run(params, tokens, lengths)
        expected, _ = lj.generate_tokens(params, CONFIG, tokens, 9, lengths=lengths, eos_id=7)
        np.testing.assert_array_equal(generated, expected)
        assert_close(plain, lj.forward(params, CONFIG, tokens))
        assert int(jnp.argmax(logits[0])) == int(expected[0, 1])

    def test_the_context_can_be_filled_to_the_last_position(self, params):
        full, cache = lj.generate_tokens(params, CONFIG, prompts(1, 60), 5)
        assert full.shape == (1, 5)
        assert cache.lengths[0] == cache.capacity == CONFIG.n_positions


class TestPaddedPrompts:
    @pytest.mark.parametrize("capacity", [23, 24, 40])
    def test_padding_that_reaches_past_the_cache_damages_nothing(self, params, capacity):
        # 20 tokens are padded to 24, behind 3 that the cache holds already
        tokens = prompts(2, 23)
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=capacity)
        _, cache = lj.prefill(params, CONFIG, tokens[:, :3], cache)
        logits, _ = lj.prefill(params, CONFIG, tokens[:, 3:], cache)
        assert_close(logits, lj.forward(params, CONFIG, tokens)[:, -1])

    def test_ragged_append_to_ragged_rows(self, params):
        first, second = prompts(2, 6), prompts(2, 5, seed=1)
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=12)
        _, cache = lj.prefill(params, CONFIG, first, cache, lengths=[6, 2])
        logits, _ = lj.prefill(params, CONFIG, second, cache, lengths=[3, 5])
        for row, (a, b) in enumerate([(6, 3), (2, 5)]):
            alone = np.concatenate([first[row, :a], second[row, :b]])[None]
            expected = lj.forward(params, CONFIG, alone)[0, -1]
            assert_close(logits[row], expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"prompt_tokens": [[1, 97]]}, lj.TokenError, r"tokens\[0, 1\].*0 \.\. 96.*97"),
            ({"prompt_tokens": [[-1]]}, lj.TokenError, r"-1"),
            ({"prompt_tokens": [[]]}, lj.TokenError, r"at least one token"),
            ({"prompt_tokens": [1, 2]}, lj.TokenError, r"\[B, T\].*\[2\]"),
            ({"prompt_tokens": [[1], [1, 2]]}, lj.TokenError, r"equal length"),
            ({"prompt_tokens": [[1.5]]}, lj.TokenError, r"integer.*float"),
            ({"prompt_tokens": np.ones((1, 65), np.int32)}, lj.CapacityError, r"n_positions=64.*"),
            ({"max_new_tokens": 0}, lj.CapacityError, r"max_new_tokens"),
            ({"max_new_tokens": 63}, lj.CapacityError, r"n_positions=64.*65"),
            ({"lengths": [4]}, lj.TokenError, r"lengths\[0\]: expected 1 \.\. 3.*4"),
            ({"lengths": [0]}, lj.TokenError, r"lengths"),
            ({"lengths": [1, 1]}, lj.TokenError, r"lengths.*\[1\].*\[2\]"),
            ({"cache": "static"}, lj.CacheError, r"cache: expected a KVCache, as make_cache makes, got 'static'"),
            ({"eos_id": 97}, lj.TokenError, r"eos_id.*97"),
            ({"sampler": lj.Sampling.create(1.0)}, lj.SamplerError, r"key"),
            ({"sampler": lj.Sampling.create(1.0), "key": np.zeros(2, np.float32)}, lj.SamplerError, r"jax.random.key"),
        ],
    )
    def test_bad_arguments(self, params, change, error, message):
        arguments = {"prompt_tokens": [[1, 2, 3]], "max_new_tokens": 4} | change
        with pytest.raises(error, match=message):
            lj.generate_tokens(params, CONFIG, **arguments)
        with pytest.raises(error, match=message):
            lj.stream_tokens(params, CONFIG, **arguments)  # at the call, not at the first token

    def test_a_full_cache_refuses_and_stays_as_it_was(self, params):
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=8)
        _, cache = lj.prefill(params, CONFIG, prompts(2, 8), cache, lengths=[8, 3])
        with pytest.raises(lj.CapacityError, match=r"row 0 holds 8 tokens; adding 1 .*capacity is 8"):
            lj.decode_step(params, CONFIG, [1, 2], cache)
        with pytest.raises(lj.CapacityError):
            lj.generate_tokens(params, CONFIG, prompts(2, 1), 4, cache=cache)
        np.testing.assert_array_equal(cache.lengths, [8, 3])

    def test_rows_must_match(self, params):
        cache = lj.StaticCache.init(CONFIG, batch_size=2, capacity=8)
        with pytest.raises(lj.TokenError, match="expected 2 rows, as many as the cache has, got 3"):
            lj.decode_step(params, CONFIG, [1, 2, 3], cache)
