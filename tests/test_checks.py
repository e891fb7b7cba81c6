"""Checks on the host: what passes, and every error's name, expectation and finding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.checks import check_append, check_context, check_lengths, check_tokens

CONFIG = lj.GPT2Config(vocab_size=10, n_positions=8, n_embd=4, n_layer=1, n_head=1)
TOKENS = jnp.zeros((2, 3), jnp.int32)


def full_cache(lengths, capacity=8):
    """A cache that claims to hold so many tokens."""
    cache = lj.StaticCache.init(CONFIG, batch_size=len(lengths), capacity=capacity)
    return cache.replace(lengths=jnp.asarray(lengths, jnp.int32))


class TestTokens:
    @pytest.mark.parametrize(
        "tokens",
        [
            [[0, 9]],
            ((0, 9),),
            np.asarray([[0, 9]], np.uint8),
            np.asarray([[0, 9]], np.int64),
            jnp.asarray([[0, 9]], jnp.uint32),
        ],
        ids=lambda tokens: type(tokens).__name__,
    )
    def test_any_integers_become_int32(self, tokens):
        checked = check_tokens(CONFIG, tokens)
        assert isinstance(checked, np.ndarray)  # NumPy's until the compiled call
        assert checked.dtype == jnp.int32
        np.testing.assert_array_equal(checked, [[0, 9]])

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            ([[0, 10]], r"tokens\[0, 1\]: expected an id in 0 \.\. 9, got 10"),
            ([[0], [-1]], r"tokens\[1, 0\]: expected an id in 0 \.\. 9, got -1"),
            ([[2**40]], r"tokens\[0, 0\]: expected .*, got 1099511627776"),
            (np.asarray([[2**32]], np.int64), r"tokens\[0, 0\]: .*, got 4294967296"),  # 0 in int32
            (jnp.asarray([[200]], jnp.uint8), r"tokens\[0, 0\]: expected .*, got 200"),
            ([[2**70]], "tokens: expected integer ids, got dtype object"),
            ([[0.0]], "tokens: expected integer ids, got dtype float64"),
            ([[True]], "tokens: expected integer ids, got dtype bool"),
            ([["0"]], "tokens: expected integer ids, got dtype <U1"),
            (jnp.zeros((1, 1)), "tokens: expected integer ids, got dtype float32"),
            ([0, 1], r"tokens: expected at least one token per row, shape \[B, T\], got shape \[2\]"),
            ([[[0]]], r"got shape \[1, 1, 1\]"),
            ([[]], r"tokens: expected at least one token per row, shape \[B, T\], got shape \[1, 0\]"),
            (np.zeros((0, 3), np.int32), r"got shape \[0, 3\]"),
            (5, r"got shape \[\]"),
            (None, r"got shape \[\]"),
            ([[0], [0, 1]], r"tokens: expected rows of equal length \[B, T\]; pad them and pass lengths"),
        ],
    )
    def test_errors(self, tokens, message):
        with pytest.raises(lj.TokenError, match=message):
            check_tokens(CONFIG, tokens)

    def test_traced_tokens_are_checked_as_far_as_they_are_known(self):
        traced = jax.jit(lambda tokens: check_tokens(CONFIG, tokens))
        np.testing.assert_array_equal(traced(jnp.asarray([[99]])), [[99]])
        with pytest.raises(lj.TokenError, match="float32"):
            traced(jnp.zeros((1, 1)))


class TestLengths:
    @pytest.mark.parametrize("lengths", [[1, 3], (1, 3), np.asarray([1, 3], np.int64), jnp.asarray([1, 3])])
    def test_any_integers_become_int32(self, lengths):
        checked = check_lengths(lengths, TOKENS)
        assert checked.dtype == jnp.int32
        np.testing.assert_array_equal(checked, [1, 3])

    def test_none_means_full_rows(self):
        np.testing.assert_array_equal(check_lengths(None, TOKENS), [3, 3])

    @pytest.mark.parametrize(
        ("lengths", "message"),
        [
            ([0, 3], r"lengths\[0\]: expected 1 \.\. 3 tokens, got 0"),
            ([1, 4], r"lengths\[1\]: expected 1 \.\. 3 tokens, got 4"),
            ([1], r"lengths: expected integers of shape \[2\], got int64 of shape \[1\]"),
            ([[1, 2]], r"lengths: .* of shape \[1, 2\]"),
            (2, r"lengths: .* of shape \[\]"),
            ([1.0, 2.0], r"lengths: expected integers of shape \[2\], got float64 of shape \[2\]"),
            ([True, True], r"lengths: .*got bool"),
        ],
    )
    def test_errors(self, lengths, message):
        with pytest.raises(lj.TokenError, match=message):
            check_lengths(lengths, TOKENS)


class TestContext:
    def test_the_last_position_may_be_used(self):
        check_context(CONFIG, [3, 5], 3)
        check_context(CONFIG, [3, 8], [5, 0])

    @pytest.mark.parametrize(("lengths", "count", "longest"), [([3, 5], 4, 9), ([0, 8], [9, 0], 9), ([9], 0, 9)])
    def test_beyond_it(self, lengths, count, longest):
        with pytest.raises(lj.CapacityError, match=f"tokens: expected at most n_positions=8 per row, got {longest}"):
            check_context(CONFIG, lengths, count)


class TestAppend:
    def test_without_a_cache(self):
        tokens, cache = check_append(CONFIG, [[1, 2, 3]], None, later=5)
        np.testing.assert_array_equal(tokens, [[1, 2, 3]])
        assert cache is None
        with pytest.raises(lj.CapacityError, match="n_positions=8 per row, got 9"):
            check_append(CONFIG, [[1, 2, 3]], None, later=6)

    def test_with_one(self):
        cache = full_cache([5, 2])
        assert check_append(CONFIG, TOKENS, cache)[1].lengths.tolist() == [5, 2]  # with room, not longer
        with pytest.raises(lj.CapacityError, match="n_positions=8 per row, got 9"):
            check_append(CONFIG, TOKENS, cache, later=1)

    def test_padding_needs_no_room(self):
        check_append(CONFIG, TOKENS, full_cache([7, 2]), count=np.asarray([1, 3]))
        with pytest.raises(lj.CapacityError, match="got 10"):
            check_append(CONFIG, TOKENS, full_cache([7, 2]), count=np.asarray([3, 1]))

    def test_a_cache_smaller_than_the_context(self):
        message = "row 1 holds 2 tokens; adding 3 makes 5, but its capacity is 4"
        with pytest.raises(lj.CapacityError, match=message):
            check_append(CONFIG, TOKENS, full_cache([1, 2], capacity=4))
        with pytest.raises(lj.CapacityError, match="its capacity is 4"):
            check_append(CONFIG, TOKENS, full_cache([1, 1], capacity=4), later=1)

    def test_another_number_of_rows(self):
        with pytest.raises(lj.TokenError, match="tokens: expected 3 rows, as many as the cache has, got 2"):
            check_append(CONFIG, TOKENS, full_cache([0, 0, 0]))

    def test_bad_tokens_come_first(self):
        with pytest.raises(lj.TokenError, match=r"tokens\[0, 0\]"):
            check_append(CONFIG, [[10] * 99], full_cache([0]))
