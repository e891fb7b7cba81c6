"""Texts that outgrow the context: exact for what is kept, in bounded memory."""

import jax
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.decoding.overflow import Reencode

CONFIG = lj.GPT2Config(vocab_size=97, n_positions=24, n_embd=32, n_layer=2, n_head=4)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, lj.init_params(CONFIG, jax.random.key(0)))


def prompts(*shape):
    return np.random.default_rng(1).integers(0, 97, shape, np.int32)


def greedy_by_hand(params, row, count, sinks, window):
    """A plain loop without a cache: the text that is seen is shortened whenever it fills the context."""
    seen, new = list(row), []
    for _ in range(count):
        if len(seen) > CONFIG.n_positions:
            seen = seen[:sinks] + seen[-window:]
        new.append(int(np.argmax(lj.forward(params, CONFIG, [seen])[0, -1])))
        seen.append(new[-1])
    return new


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (4, 12), (3, 20)])
def test_equals_a_plain_loop(params, sinks, window):
    row = prompts(1, 9)
    generated, cache = lj.generate_tokens(params, CONFIG, row, 60, overflow=Reencode(sinks, window))
    assert generated[0].tolist() == greedy_by_hand(params, row[0].tolist(), 60, sinks, window)
    assert cache.capacity == CONFIG.n_positions


def test_stream_equals_loop_in_a_ragged_batch_with_ends(params):
    tokens, lengths = prompts(3, 20), [20, 3, 11]
    common = {"lengths": lengths, "sampler": lj.Sampling.create(1.0), "key": jax.random.key(3), "overflow": "reencode"}
    free, _ = lj.generate_tokens(params, CONFIG, tokens, 50, **common)
    eos = int(free[1, 30])
    batch, _ = lj.generate_tokens(params, CONFIG, tokens, 50, eos_id=eos, **common)
    streamed = np.stack(list(lj.stream_tokens(params, CONFIG, tokens, 50, eos_id=eos, **common)), 1)
    np.testing.assert_array_equal(streamed, batch[:, : streamed.shape[1]])
    for row in range(3):
        ends = np.flatnonzero(np.asarray(free[row]) == eos)
        end = int(ends[0]) if ends.size else 49
        np.testing.assert_array_equal(batch[row, : end + 1], free[row, : end + 1])
        assert np.all(np.asarray(batch[row, end + 1 :]) == eos)


def test_a_prompt_longer_than_the_context_is_shortened(params):
    row = prompts(1, 40)
    kept = np.concatenate([row[:, :4], row[:, -12:]], 1)
    long, _ = lj.generate_tokens(params, CONFIG, row, 5, overflow="reencode")
    short, _ = lj.generate_tokens(params, CONFIG, kept, 5)
    np.testing.assert_array_equal(long, short)


def test_nothing_changes_while_the_text_fits(params):
    fits, _ = lj.generate_tokens(params, CONFIG, prompts(2, 5), 20)
    same, _ = lj.generate_tokens(params, CONFIG, prompts(2, 5), 20, overflow="reencode")
    np.testing.assert_array_equal(fits, same)


def test_compiles_nothing_new_after_the_first_re_encoding(params):
    lj.generate_tokens(params, CONFIG, prompts(1, 5), 60, overflow="reencode")
    count = lj.compile_count()
    lj.generate_tokens(params, CONFIG, prompts(1, 5), 60, overflow="reencode")
    assert lj.compile_count() == count


def test_errors(params):
    with pytest.raises(lj.CapacityError, match=r"n_positions=24.*25"):
        lj.generate_tokens(params, CONFIG, prompts(1, 5), 21)
    for bad in (Reencode(sinks=20, window=5), Reencode(window=0), Reencode(sinks=-1)):
        with pytest.raises(lj.CapacityError, match="sinks >= 0 and window >= 1"):
            lj.generate_tokens(params, CONFIG, prompts(1, 5), 30, overflow=bad)
    with pytest.raises(lj.CapacityError, match="'error', 'reencode'"):
        lj.generate_tokens(params, CONFIG, prompts(1, 5), 30, overflow="drop")
    cache = lj.StaticCache.init(CONFIG, batch_size=1)
    _, cache = lj.prefill(params, CONFIG, prompts(1, 5), cache)
    with pytest.raises(lj.CapacityError, match="empty cache"):
        lj.generate_tokens(params, CONFIG, prompts(1, 5), 30, cache, overflow="reencode")


def test_a_row_does_not_depend_on_its_batch(params):
    tokens, lengths = prompts(2, 22), [22, 9]
    sampler, keys = lj.Sampling.create(1.0), jax.random.split(jax.random.key(5), 2)
    together, _ = lj.generate_tokens(
        params, CONFIG, tokens, 40, lengths=lengths, sampler=sampler, key=keys, overflow=Reencode(2, 8)
    )
    alone, _ = lj.generate_tokens(
        params, CONFIG, tokens[1:, :9], 40, sampler=sampler, key=keys[1:], overflow=Reencode(2, 8)
    )
    np.testing.assert_array_equal(together[1], alone[0])


def test_the_cache_of_an_ended_row_holds_no_filler(params):
    tokens, lengths = prompts(2, 20), [20, 4]
    free, _ = lj.generate_tokens(params, CONFIG, tokens, 40, lengths=lengths, overflow=Reencode(2, 8))
    eos = int(free[1, 2])
    assert eos not in np.asarray(free[0])
    assert eos not in np.asarray(free[1, :2])
    _, cache = lj.generate_tokens(params, CONFIG, tokens, 40, lengths=lengths, overflow=Reencode(2, 8), eos_id=eos)
    assert int(cache.lengths[1]) == 4 + 2


@pytest.mark.parametrize("impossible", [Reencode(1.5, 8), Reencode(0, "8"), Reencode(-1, 8), Reencode(20, 8)])
def test_impossible_settings_are_named(params, impossible):
    with pytest.raises(lj.CapacityError, match="overflow: expected sinks >= 0 and window >= 1"):
        lj.generate_tokens(params, CONFIG, prompts(1, 9), 60, overflow=impossible)


def test_a_long_value_is_named_in_a_short_line(params):
    with pytest.raises(
        lj.CapacityError, match="overflow: expected 'error', 'reencode' or a Reencode, got 'xxx"
    ) as refused:
        lj.generate_tokens(params, CONFIG, prompts(1, 9), 4, overflow="x" * 5000)
    assert len(str(refused.value)) < 200


def test_a_pool_too_small_for_a_later_part_is_told_at_once(params):
    tokens, lengths = prompts(2, 20), [20, 3]
    pool = lj.PagedCache.init(CONFIG, batch_size=2, page_size=4, num_pages=8)  # enough for the first part only
    with pytest.raises(lj.CapacityError, match="pages"):
        lj.generate_tokens(params, CONFIG, tokens, 50, cache=pool, lengths=lengths, overflow="reencode")
    enough = lj.PagedCache.init(CONFIG, batch_size=2, page_size=4, num_pages=12)
    paged, _ = lj.generate_tokens(params, CONFIG, tokens, 50, cache=enough, lengths=lengths, overflow="reencode")
    static, _ = lj.generate_tokens(params, CONFIG, tokens, 50, lengths=lengths, overflow="reencode")
    np.testing.assert_array_equal(paged, static)
