"""What every lossless cache must do, checked against the static cache and the forward pass without a cache."""

import dataclasses

import numpy as np
import pytest
from cache_cases import (
    COLUMNS,
    append,
    append_owned,
    assert_close,
    batches,
    configs,
    feed,
    in_chunks,
    make_batch,
    make_config,
    make_params,
    rms,
    splits,
    uncached,
)
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from llorch_jax.cache.layouts import LAYOUTS, make_cache
from llorch_jax.cache.operations import concat, convert, fork, split
from llorch_jax.cache.static import StaticCache
from llorch_jax.decoding import loop as decoding

LOSSLESS = {
    "static": {"capacity": 32},
    "dynamic": {"capacity": 40},
    "paged": {"capacity": 32, "page_size": 8},
    "rotating:28+3": {},  # never wraps: rows have up to 24 tokens
}
assert {spec.split(":")[0] for spec in LOSSLESS} == {name for name, layout in LAYOUTS.items() if layout.lossless}
TINY = make_config(layers=1, heads=2, kv_heads=1, head_dim=15)
PLAIN = make_config(layers=2, heads=2, kv_heads=1, head_dim=15)
SHARING = make_config(layers=3, heads=4, kv_heads=2, head_dim=8, kv_sharing=(0, 1, 0), sliding_window=6)
WIDTHS = (1, 16)
every_strategy = pytest.mark.parametrize("strategy", LOSSLESS)


def new(strategy, config=PLAIN, batch_size=3):
    return make_cache(config, strategy, batch_size=batch_size, **LOSSLESS[strategy])


def later(batch, start):
    """Chunks of the tokens of a batch from `start` [B] on."""
    return in_chunks(batch.lengths - start, 16)


def behind(logits, start):
    """Logits with NaN before position `start` [B] of each row."""
    return np.where(np.arange(logits.shape[1])[None, :, None] < start[:, None, None], np.nan, logits)


def spliced(first, second, at):
    """The tokens of the first batch up to `at` [B], and those of the second one from there on."""
    tokens = np.where(np.arange(COLUMNS) < at[:, None], first.tokens, second.tokens)
    return dataclasses.replace(second, tokens=tokens, lengths=np.maximum(second.lengths, at))


def check_continuation(cache, batch, start):
    """Fed with the tokens of a batch from `start` [B] on, the cache must give the logits of the whole batch."""
    logits, cache = feed(PLAIN, cache, batch, later(batch, start), start=start)
    expected = uncached(PLAIN, batch)
    assert_close(logits, behind(expected, start), scale=rms(expected))
    assert np.array_equal(cache.lengths, batch.lengths)
    return cache


@every_strategy
@examples(5)
@given(data=st.data(), config=configs((PLAIN, SHARING)), batch=batches(sizes=(3,)))
def test_logits_equal_those_of_the_static_cache_and_without_any(strategy, data, config, batch):
    chunks = data.draw(splits(batch.lengths, widths=WIDTHS))
    logits, cache = feed(config, new(strategy, config), batch, chunks)
    assert_close(logits, uncached(config, batch))
    static, _ = feed(config, StaticCache.init(config, batch_size=3, capacity=32), batch, chunks)
    assert_close(logits, static)
    assert np.array_equal(cache.lengths, batch.lengths)


@pytest.mark.parametrize("strategy", ["static", "dynamic"])  # the others' tests have their own
def test_jitted_and_donated_equal_unjitted(strategy):
    batch = make_batch([17, 3, 14], seed=1)
    chunks = [*in_chunks([16, 2, 13], 16), *in_chunks([1, 1, 1], 1)]
    plain, plain_cache = feed(TINY, new(strategy, TINY), batch, chunks, step=append)
    logits, cache = feed(TINY, new(strategy, TINY), batch, chunks, step=append_owned)
    assert_close(logits, plain)
    assert np.array_equal(cache.lengths, plain_cache.lengths)


@every_strategy
@examples(4)
@given(data=st.data(), batch=batches(sizes=(3,)))
def test_ragged_row_equals_the_row_alone(strategy, data, batch):
    row = data.draw(st.integers(0, 2))
    together, _ = feed(PLAIN, new(strategy), batch, data.draw(splits(batch.lengths, widths=WIDTHS)))
    alone = batch.row(row)
    logits, _ = feed(PLAIN, new(strategy, batch_size=1), alone, in_chunks(alone.lengths, 16))
    assert_close(together[row : row + 1], logits)


@every_strategy
@examples(5)
@given(data=st.data(), first=batches(sizes=(3,)), second=batches(sizes=(3,)))
def test_crop_then_continue_equals_never_having_gone_on(strategy, data, first, second):
    at = np.array([data.draw(st.integers(0, int(n))) for n in first.lengths], np.int32)
    _, cache = feed(PLAIN, new(strategy), first, in_chunks(first.lengths, 16))
    check_continuation(cache.crop(at), spliced(first, second, at), at)
    check_continuation(cache.clear(), second, np.zeros(3, np.int32))


@every_strategy
@examples(5)
@given(data=st.data(), first=batches(sizes=(3,)), second=batches(sizes=(3,)))
def test_selected_and_forked_rows_go_on_independently(strategy, data, first, second):
    rows = np.array(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
    _, cache = feed(PLAIN, new(strategy), first, in_chunks(first.lengths, 16))
    chosen = dataclasses.replace(first, tokens=first.tokens[rows], lengths=first.lengths[rows])
    check_continuation(cache.select(rows), spliced(chosen, second, chosen.lengths), chosen.lengths)
    chosen = dataclasses.replace(first, tokens=first.tokens[[rows[0]] * 3], lengths=first.lengths[[rows[0]] * 3])
    branches = fork(cache.select(rows[:1]), 3)
    check_continuation(branches, spliced(chosen, second, chosen.lengths), chosen.lengths)
    check_continuation(cache, spliced(first, second, first.lengths), first.lengths)  # as if none of it had happened


@every_strategy
@examples(5)
@given(first=batches(sizes=(3,)), second=batches(sizes=(3,)))
def test_converted_there_and_back(strategy, first, second):
    whole = spliced(first, second, first.lengths)
    _, static = feed(PLAIN, new("static"), first, in_chunks(first.lengths, 16))
    cache = check_continuation(convert(static, new(strategy)), whole, first.lengths)
    back = convert(cache.crop(first.lengths), new("static"))
    check_continuation(back, whole, first.lengths)


@every_strategy
@examples(5)
@given(first=batches(sizes=(3,)), second=batches(sizes=(3,)))
def test_split_and_put_together_in_another_order(strategy, first, second):
    _, cache = feed(PLAIN, new(strategy), first, in_chunks(first.lengths, 16))
    one, two = split(cache, [1, 2])
    order = [1, 2, 0]
    moved = dataclasses.replace(first, tokens=first.tokens[order], lengths=first.lengths[order])
    check_continuation(concat([two, one]), spliced(moved, second, moved.lengths), moved.lengths)


@every_strategy
def test_generates_the_tokens_of_the_static_cache(strategy):
    batch = make_batch([9, 2, 14], seed=3)
    arguments = (make_params(PLAIN), PLAIN, batch.tokens[:, :14], 9)
    expected, _ = decoding.generate_tokens(*arguments, new("static"), batch.lengths)
    tokens, cache = decoding.generate_tokens(*arguments, new(strategy), batch.lengths)
    assert np.array_equal(tokens, expected)
    assert np.array_equal(cache.lengths, batch.lengths + 8)
    streamed = list(decoding.stream_tokens(*arguments, new(strategy), batch.lengths))
    assert np.array_equal(np.stack(streamed, axis=1), expected)


@every_strategy
def test_finished_rows_stay_as_they_are(strategy):
    batch = make_batch([9, 2, 14], seed=3)
    arguments = (make_params(PLAIN), PLAIN, batch.tokens[:, :14], 9)
    free, _ = decoding.generate_tokens(*arguments, new("static"), batch.lengths)
    eos = int(free[1, 3])
    expected, static = decoding.generate_tokens(*arguments, new("static"), batch.lengths, eos_id=eos)
    tokens, cache = decoding.generate_tokens(*arguments, new(strategy), batch.lengths, eos_id=eos)
    assert np.array_equal(tokens, expected)
    assert np.array_equal(cache.lengths, static.lengths)
    assert cache.lengths[1] < batch.lengths[1] + 8
    whole = dataclasses.replace(batch, lengths=np.asarray(cache.lengths))
    whole.tokens[:, :] = np.where(np.arange(COLUMNS) < batch.lengths[:, None], batch.tokens, 0)
    for row, length in enumerate(batch.lengths):
        whole.tokens[row, length : length + 9] = tokens[row]
    more = dataclasses.replace(whole, lengths=np.minimum(whole.lengths + 2, COLUMNS))
    check_continuation(cache, more, whole.lengths)
