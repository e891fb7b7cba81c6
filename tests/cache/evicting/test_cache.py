"""Eviction: policies against plain NumPy, the compacting cache against one that keeps everything and masks."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import (
    append,
    append_owned,
    assert_close,
    decode_copies,
    feed,
    in_chunks,
    make_batch,
    make_config,
    make_params,
    pointers,
)
from flax import struct
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import llorch_jax as lj
from llorch_jax.attention import DenseView, Queries, attention_mass
from llorch_jax.cache import StaticCache, convert, make_cache, plan_memory
from llorch_jax.cache.evicting.evict import AttentionSinks, EvictingCache, HeavyHitters, RecencyWindow, SnapKV, evict
from llorch_jax.decoding import loop as decoding
from llorch_jax.errors import CacheError, CapacityError

CONFIG = make_config(layers=2, heads=4, kv_heads=2, head_dim=8)
WINDOWED = make_config(layers=2, heads=4, kv_heads=2, head_dim=8, sliding_window=9)
BUDGET, SLACK = 6, 3
POLICIES = {
    "recent": RecencyWindow(),
    "sinks": AttentionSinks(2),
    "h2o": HeavyHitters(),
    "snapkv": SnapKV(observation=2, kernel=3),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


def kept_by(name, votes, positions, length, budget):
    """The positions that a policy keeps of one head, by sorting in plain Python."""
    held = sorted(positions)
    vote = dict(zip(positions, votes, strict=True))
    if name == "recent":
        return set(held[-budget:])
    if name == "sinks":
        sinks = [p for p in held if p < 2]
        return set(sinks + held[len(sinks) :][len(sinks) - budget :])
    if name == "snapkv":
        order = {p: i for i, p in enumerate(positions)}
        pooled = {p: max(votes[max(0, i - 1) : i + 2]) for p, i in order.items()}
        vote, recent = pooled, [p for p in held if p >= length - 2]
    else:
        recent = [p for p in held if p >= length - round(budget / 2)]
    rest = sorted((p for p in held if p not in recent), key=lambda p: (-vote[p], p))
    return set(recent + rest[: budget - len(recent)])


@every_policy
@examples(25)
@given(seed=st.integers(0, 10**6), budget=st.sampled_from([5, 6]))
def test_policies_keep_what_plain_python_keeps(name, seed, budget):
    random, slots, length = np.random.default_rng(seed), 12, 40
    positions = np.full((2, 2, slots), -1, np.int32)
    held = random.integers(budget, slots + 1, 2)
    votes = random.permutation(2 * 2 * slots).reshape(2, 2, slots).astype(np.float32)
    for row, count in enumerate(held):
        for head in range(2):
            positions[row, head, :count] = np.sort(random.choice(length, count, replace=False))
            votes[row, head, count:] = 0
    chosen = jax.jit(POLICIES[name], static_argnums=3)(votes, positions, jnp.full(2, length, jnp.int32), budget)
    for row, head in np.ndindex(2, 2):
        count = held[row]
        got = {int(positions[row, head, slot]) for slot in chosen[row, head]}
        assert got == kept_by(name, votes[row, head, :count], positions[row, head, :count].tolist(), length, budget)


@struct.dataclass(kw_only=True)
class MaskingCache(StaticCache):
    """Keeps everything, but shows each head only what has not been masked: what eviction must be equal to."""

    shown: tuple[jax.Array, ...]
    votes: tuple[jax.Array, ...]
    policy: object = struct.field(pytree_node=False)

    def read(self, layer):
        view = super().read(layer)
        return view.replace(positions=jnp.where(self.shown[layer], view.positions[:, None], -1))

    def append(self, layer, k, v, count=None, *, fresh=False):
        return super().append(layer, k, v, count)  # a first append, too, shows what is masked

    def observe(self, layer, q, view, queries, scale):
        return EvictingCache.observe(self, layer, q, view, queries, scale)

    @classmethod
    def new(cls, config, policy, batch):
        static = StaticCache.init(config, batch_size=batch, capacity=48)
        shape, layers = (batch, config.kv_heads, 48), range(config.cache_layers)
        fields = {name: getattr(static, name) for name in ("keys", "values", "lengths", "codec")}
        shown = tuple(jnp.ones(shape, bool) for _ in layers)
        return cls(**fields, shown=shown, votes=tuple(jnp.zeros(shape) for _ in layers), policy=policy)

    def evicted(self, name):
        """After masking what the policy drops in rows that hold more than they may."""
        shown, votes = np.array(self.shown), np.array(self.votes)
        for row, length in enumerate(np.asarray(self.lengths)):
            if shown[0, row, 0, :length].sum() <= BUDGET + SLACK - 1:
                continue
            for layer, head in np.ndindex(shown.shape[0], shown.shape[2]):
                held = np.flatnonzero(shown[layer, row, head, :length])
                kept = kept_by(name, votes[layer, row, head, held], held.tolist(), length, BUDGET)
                shown[layer, row, head, :length] = np.isin(np.arange(length), list(kept))
                votes[layer, row, head] *= name == "h2o"
        return self.replace(shown=tuple(map(jnp.asarray, shown)), votes=tuple(map(jnp.asarray, votes)))


@pytest.mark.parametrize(
    ("name", "config"), [("recent", CONFIG), ("sinks", WINDOWED), ("h2o", CONFIG), ("snapkv", WINDOWED)]
)
def test_logits_are_those_of_masking_the_evicted_tokens(name, config):
    batch = make_batch([24, 10, 17], seed=5)
    cache = EvictingCache.init(config, batch_size=3, policy=POLICIES[name], budget=BUDGET, slack=SLACK)
    oracle = MaskingCache.new(config, POLICIES[name], 3)
    prompts = np.array([13, 4, 1], np.int32)
    _, cache = feed(config, cache, batch, in_chunks(prompts, 16))
    _, oracle = feed(config, oracle, batch, in_chunks(prompts, 16))
    done = prompts
    while (done < batch.lengths).any():
        chunk = in_chunks(np.minimum(batch.lengths - done, 1), 1)
        logits, cache = feed(config, cache, batch, chunk, start=done)
        expected, oracle = feed(config, oracle.evicted(name), batch, chunk, start=done)
        assert_close(logits, expected, scale=1.5)
        done = done + chunk[0].count
    assert cache.slots == BUDGET + SLACK
    assert (
        np.asarray(cache.held).tolist()
        == np.asarray(oracle.shown)[0, np.arange(3), 0].cumsum(1)[np.arange(3), batch.lengths - 1].tolist()
    )


def test_attention_mass_is_the_sum_of_softmax_weights():
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 5, 4, 8)).astype(np.float32), random.normal(size=(2, 2, 7, 8)).astype(np.float32)
    positions, voters = np.array([[2, 3, 4, 5, 6]] * 2, np.int32), np.array([[4, 1], [0, -1]], np.int32)
    view = DenseView(jnp.asarray(k), jnp.asarray(k), jnp.arange(7, dtype=jnp.int32)[None])
    mass = attention_mass(jnp.asarray(q), view, Queries(positions, window=4), 0.3, voters)
    expected = np.zeros((2, 2, 7))
    for row, voter, head in np.ndindex(2, 2, 4):
        if (query := voters[row, voter]) < 0:
            continue
        at, scores = positions[row, query], k[row, head // 2] @ q[row, query, head] * 0.3
        scores = np.where((np.arange(7) <= at) & (np.arange(7) > at - 4), scores, -np.inf)
        expected[row, head // 2] += np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    np.testing.assert_allclose(mass, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["snapkv"])
def test_a_row_does_not_depend_on_its_batch(name):
    batch = make_batch([24, 9, 20], seed=2)
    make = partial(EvictingCache.init, CONFIG, policy=POLICIES[name], budget=BUDGET, slack=SLACK)
    chunks = in_chunks([1] * 3, 1)

    def run(batch):
        logits, cache = feed(CONFIG, make(batch_size=batch.size), batch, in_chunks(batch.lengths - 5, 24))
        for step in range(5):
            more, cache = feed(CONFIG, cache, batch, [dataclasses.replace(chunks[0], count=np.ones(batch.size, int))],
                               start=batch.lengths - 5 + step)  # fmt: skip
            logits = np.where(np.isnan(more), logits, more)
        return logits

    together = run(batch)
    assert_close(together[1:2], run(batch.row(1)))


@pytest.mark.parametrize("strategy", ["paged", "int8"])
def test_evicts_from_any_layout_that_keeps_all(strategy):
    batch, config = make_batch([20, 5, 13], seed=1), CONFIG
    _, cache = feed(config, make_cache(config, strategy, batch_size=3), batch, in_chunks([18, 4, 12], 24))
    votes = tuple(
        np.random.default_rng(layer).random(cache.read(layer).dense().k.shape[:3], np.float32) for layer in range(2)
    )
    small = evict(cache, HeavyHitters(), BUDGET, votes=votes, slack=SLACK)
    assert (small.slots, small.batch_size) == (BUDGET + SLACK, 3)
    assert np.asarray(small.held).tolist() == [BUDGET, 4, BUDGET]
    for layer in range(2):
        old, new = (jax.tree.map(np.asarray, each.read(layer).dense()) for each in (cache, small))
        for row, length in enumerate([18, 4, 12]):
            for head in range(2):
                got = np.asarray(new.positions[row, head, : small.held[row]])
                kept = kept_by("h2o", votes[layer][row, head, :length], list(range(length)), length, BUDGET)
                assert got.tolist() == (sorted(kept) if length > BUDGET else list(range(length)))
                np.testing.assert_array_equal(new.k[row, head, : got.size], old.k[row, head, got])
                np.testing.assert_array_equal(new.v[row, head, : got.size], old.v[row, head, got])
    rest = in_chunks([2, 1, 1], 1)
    logits, _ = feed(config, small, batch, rest, start=[18, 4, 12])
    expected, _ = feed(config, cache, batch, rest, start=[18, 4, 12])
    assert_close(logits[1], expected[1])  # this row lost nothing
    assert np.asarray(cache.lengths).tolist() == [18, 4, 12]


def test_evicting_again_with_another_policy():
    batch = make_batch([24], seed=3)
    cache = EvictingCache.init(CONFIG, policy=HeavyHitters(), budget=12, slack=4)
    _, cache = feed(CONFIG, cache, batch, in_chunks(batch.lengths, 24))
    once = evict(cache, HeavyHitters(0.25), 12)
    twice = evict(once, AttentionSinks(1), 4)
    for layer in range(2):
        before, after = np.asarray(once.read(layer).positions), np.asarray(twice.read(layer).positions)
        for head in range(2):
            first, *newest = before[0, head, :12]
            sinks = [first] if first == 0 else []
            assert after[0, head, :4].tolist() == [*sinks, *newest[len(newest) - 4 + len(sinks) :]]


def test_a_function_of_the_users_own():
    def keep_even(votes, positions, lengths, budget):
        priority = jnp.where(positions % 2 == 0, 1000, 0) + positions
        return jax.lax.top_k(jnp.where(positions < 0, -1, priority), budget)[1]

    cache = EvictingCache.init(CONFIG, policy=keep_even, budget=4, slack=2)
    _, cache = feed(CONFIG, cache, make_batch([11]), in_chunks([11], 16))
    assert cache.reserve(1).read(1).positions[0, 1, :4].tolist() == [4, 6, 8, 10]
    assert cache.votes == ()
    with pytest.raises(CacheError, match="policy: expected distinct slots"):
        evict(cache, lambda votes, positions, lengths, budget: jnp.zeros((1, 2, budget), jnp.int32), 4)
    with pytest.raises(CacheError, match="below the"):
        evict(cache, lambda v, positions, n, budget: positions[..., -budget:] * 0 + 9 + jnp.arange(4)[None, None], 4)


def test_crop_goes_back_to_the_last_eviction_only():
    batch = make_batch([24], seed=7)
    cache = EvictingCache.init(CONFIG, policy=HeavyHitters(), budget=BUDGET, slack=4)
    _, cache = feed(CONFIG, cache, batch, in_chunks([16], 16))
    first, cache = feed(CONFIG, cache, batch, in_chunks([3], 1), start=[16])
    again, _ = feed(CONFIG, cache.crop(17), batch, in_chunks([2], 1), start=[17])
    assert_close(again[:, 17:19], first[:, 17:19], scale=1.5)
    with pytest.raises(CacheError, match="row 0 cannot continue from 15 tokens"):
        cache.crop(15)
    in_jit = jax.jit(lambda cache: cache.crop(15))(cache)
    with pytest.raises(CacheError, match="were evicted when it had 16"):
        in_jit.reserve(1)
    fresh, _ = feed(CONFIG, cache.clear(), batch, in_chunks([5], 16))
    expected, _ = feed(CONFIG, StaticCache.init(CONFIG, capacity=16), batch, in_chunks([5], 16))
    assert_close(fresh, expected)


def test_converts_only_what_it_has_not_dropped():
    batch = make_batch([14], seed=7)
    for budget in (20, 8):
        cache = EvictingCache.init(CONFIG, policy=HeavyHitters(), budget=budget, slack=4)
        _, cache = feed(CONFIG, cache, batch, in_chunks([12], 16))
        cache = cache.reserve(1)
        if budget == 8:
            with pytest.raises(CacheError, match="has dropped the one at position"):
                convert(cache, StaticCache.init(CONFIG))
        else:
            static = convert(cache, StaticCache.init(CONFIG))
            logits, _ = feed(CONFIG, static, batch, in_chunks([2], 1), start=[12])
            expected, _ = feed(CONFIG, cache, batch, in_chunks([2], 1), start=[12])
            assert_close(logits, expected)


@pytest.mark.parametrize("name", ["h2o", "sinks"])
def test_saved_and_loaded_goes_on_alike(name, tmp_path):
    batch = make_batch([20], seed=4)
    cache = EvictingCache.init(CONFIG, policy=POLICIES[name], budget=BUDGET, slack=SLACK)
    _, cache = feed(CONFIG, cache, batch, in_chunks([16], 16))
    cache = cache.reserve(1)
    lj.save_cache(tmp_path / "c.safetensors", cache)
    loaded = lj.load_cache(tmp_path / "c.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)
    step = partial(feed, CONFIG, batch=batch, chunks=in_chunks([4], 1), start=[16])
    assert_close(step(cache=loaded)[0], step(cache=cache)[0], tolerance=0)


def test_own_functions_cannot_be_saved(tmp_path):
    cache = EvictingCache.init(CONFIG, policy=lambda *_: None, budget=4)
    with pytest.raises(CacheError, match=r"numbers or one of AttentionSinks.* as policy, got"):
        lj.save_cache(tmp_path / "c.safetensors", cache)
    assert not list(tmp_path.iterdir())


def test_memory_is_bounded_planned_and_written_in_place():
    plan = plan_memory(CONFIG, "h2o:6", batch_size=2, slack=3)
    cache = make_cache(CONFIG, "h2o:6", batch_size=2, slack=3)
    assert cache.memory_usage() == plan.total
    assert plan.slots == 2 * 9
    assert decode_copies(CONFIG, cache) == []
    tokens, after = decoding.generate_tokens(make_params(CONFIG), CONFIG, make_batch([20, 3]).tokens[:, :20], 40, cache)
    assert after.memory_usage() == plan.total
    assert np.asarray(after.lengths).tolist() == [59, 59]
    cache = make_cache(CONFIG, "h2o:6", batch_size=2, slack=3)
    streamed = list(decoding.stream_tokens(
        make_params(CONFIG), CONFIG, make_batch([20, 3]).tokens[:, :20], 40, cache))  # fmt: skip
    assert np.array_equal(np.stack(streamed, 1), tokens)
    _, cache = feed(CONFIG, after.clear(), make_batch([1, 1]), in_chunks([1, 1], 1), step=append_owned)
    before = pointers(cache)
    _, cache = feed(CONFIG, cache, make_batch([3, 3]), in_chunks([2, 2], 1), start=[1, 1], step=append_owned)
    keys = len(cache.keys) * 2
    assert pointers(cache)[:keys] == before[:keys]


def test_jitted_equals_unjitted():
    batch = make_batch([16, 7, 12], seed=1)
    make = partial(EvictingCache.init, CONFIG, batch_size=3, policy=HeavyHitters(), budget=BUDGET, slack=SLACK)
    chunks = [*in_chunks([14, 5, 10], 16), *in_chunks([2, 2, 2], 1)]
    plain, _ = feed(CONFIG, make(), batch, chunks, step=append)
    jitted, _ = feed(CONFIG, make(), batch, chunks)
    assert_close(jitted, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget: expected a whole number from 1 up, got 0"),
        ({"budget": 4, "slack": 0}, "slack: expected a whole number from 1 up"),
        ({"budget": 4, "policy": "h2o"}, "policy: expected a function"),
        ({"budget": 4, "policy": HeavyHitters}, "policy: expected a function"),
        ({"budget": 4, "dtype": "int8"}, "dtype"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(CacheError, match=message):
        EvictingCache.init(CONFIG, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionSinks(-1), "sinks"),
        (lambda: HeavyHitters(1.5), "recent"),
        (lambda: SnapKV(kernel=4), "kernel: expected an odd"),
        (lambda: SnapKV(observation=0), "observation"),
        (lambda: evict(make_cache(CONFIG, "rotating:8"), AttentionSinks(), 4), "got a RotatingCache"),
        (lambda: evict(make_cache(CONFIG), HeavyHitters(), 4), "votes: expected an array of shape"),
        (lambda: evict(make_cache(CONFIG), HeavyHitters(), 4, votes=(jnp.zeros((1, 2, 3)),) * 2), "got .*3"),
        (lambda: make_cache(CONFIG, "h2o:0"), "budget"),
        (lambda: make_cache(CONFIG, "h2o"), "budget: expected a value"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(CacheError, match=message):
        make()


def test_ends_where_the_context_ends():
    cache = EvictingCache.init(CONFIG, budget=4)
    assert cache.capacity == CONFIG.n_positions
    with pytest.raises(CapacityError):
        decoding.generate_tokens(make_params(CONFIG), CONFIG, make_batch([20]).tokens[:, :20], 50, cache)


def test_votes_do_not_depend_on_other_rows():
    batch = make_batch([20, 9], seed=8)
    make = partial(EvictingCache.init, CONFIG, policy=SnapKV(observation=4), budget=40)
    second = dataclasses.replace(in_chunks([16], 16)[0], count=np.array([14, 3]))
    _, together = feed(CONFIG, make(batch_size=2), batch, in_chunks([6, 6], 16))
    _, together = feed(CONFIG, together, batch, [second], start=[6, 6])
    _, alone = feed(CONFIG, make(batch_size=1), batch.row(1), in_chunks([6], 16))
    _, alone = feed(CONFIG, alone, batch.row(1), [dataclasses.replace(second, count=np.array([3]))], start=[6])
    for ours, theirs in zip(together.votes, alone.votes, strict=True):
        np.testing.assert_allclose(ours[1, :, :9], theirs[0, :, :9], rtol=1e-4)


def test_caches_that_a_prompt_enlarged_are_joined_and_pooled():
    small = EvictingCache.init(CONFIG, budget=4, slack=2)
    _, large = feed(CONFIG, small, make_batch([20]), in_chunks([20], 24))
    joined = lj.cache.concat([large, small])
    assert (joined.batch_size, joined.slots) == (2, large.slots)
    pool = lj.CachePool()
    pool.release(large)
    assert pool.acquire(EvictingCache, CONFIG, budget=4, slack=2).slots == joined.slots
    assert pool.memory_usage() == 0
