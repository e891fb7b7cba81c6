"""Memory plans, cache specifications, and the pool of released buffers."""

import threading

import jax
import numpy as np
import pytest
from cache_cases import (
    CONFIGS,
    LAYOUT_SPECS,
    append_owned,
    feed,
    in_chunks,
    make_batch,
    make_config,
    make_params,
    pointers,
)

from llorch_jax.cache.buffers import CachePool
from llorch_jax.cache.codecs import CODECS
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.layouts import LAYOUTS, SYNTAX, fit_cache, make_cache, parse_cache_spec
from llorch_jax.cache.paged.cache import PagedCache
from llorch_jax.cache.planning import plan_memory
from llorch_jax.cache.quantized import QuantizedCache
from llorch_jax.cache.rotating import RotatingCache
from llorch_jax.cache.static import StaticCache
from llorch_jax.config import GPT2Config
from llorch_jax.decoding import loop as decoding
from llorch_jax.errors import CacheError, CapacityError

SPECS = (*LAYOUT_SPECS.values(), "static:40", "paged:8:40")
SMALL = make_config(layers=1, heads=2, kv_heads=1, head_dim=5)


PAIRS = [(spec, codec) for spec in SPECS for codec in (None, *CODECS) if codec is None or not spec.startswith("int")]


@pytest.mark.parametrize(("spec", "codec"), PAIRS)
def test_plan_equals_the_real_cache(spec, codec):
    for config, batch_size in ((CONFIGS[3], 1), (CONFIGS[5], 3)):
        settings = {"batch_size": batch_size, "codec": codec}
        plan = plan_memory(config, spec, **settings)
        cache = make_cache(config, spec, **settings)
        assert int(plan) == plan.total == cache.memory_usage() == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        assert plan.total == plan.per_layer * config.cache_layers + plan.overhead
        assert plan.per_token * plan.slots == plan.per_layer * config.cache_layers
        assert (plan.full > plan.total) == spec.startswith("dynamic")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("capacity", [1, 20, 64])
def test_plan_follows_capacity_and_dtype(dtype, capacity):
    plan = plan_memory(SMALL, capacity=capacity, batch_size=2, dtype=dtype)
    assert plan.per_token == 2 * 1 * 5 * np.dtype("float32" if dtype == "float32" else "float16").itemsize
    assert plan.total == plan.per_token * 2 * capacity + 8
    grown = DynamicCache.init(SMALL, capacity=capacity, batch_size=2, dtype=dtype).reserve(capacity)
    assert plan_memory(SMALL, "dynamic", capacity=capacity, batch_size=2, dtype=dtype).full == grown.memory_usage()


def test_plan_of_a_large_model_allocates_nothing():
    config = GPT2Config(n_embd=1600, n_layer=48, n_head=25)  # gpt2-xl
    plan = plan_memory(config, batch_size=10_000)
    assert plan.total == 2 * 48 * 10_000 * 1024 * 1600 * 4 + 40_000  # 6.3 TB
    assert plan_memory(config, PagedCache, page_size=64, num_pages=10).slots == 640


def test_specifications():
    expected = {
        "static": (StaticCache, {}),
        "dynamic": (DynamicCache, {}),
        "rotating:256": (RotatingCache, {"window": 256}),
        "rotating:256+4": (RotatingCache, {"window": 256, "sinks": 4}),
        "rotating:8+0": (RotatingCache, {"window": 8, "sinks": 0}),
        "paged": (PagedCache, {}),
        "paged:64": (PagedCache, {"page_size": 64}),
        "static:40": (StaticCache, {"capacity": 40}),
        "paged:16:48": (PagedCache, {"page_size": 16, "capacity": 48}),
        "int8": (QuantizedCache, {"bits": 8}),
        "int8:40": (QuantizedCache, {"bits": 8, "capacity": 40}),
        "int4": (QuantizedCache, {"bits": 4}),
    }
    for spec, meaning in expected.items():
        assert parse_cache_spec(spec) == meaning
        assert type(make_cache(SMALL, spec if spec != "paged:64" else "paged:16")) is meaning[0]
    parse_cache_spec("int8")[1]["bits"] = 3
    assert LAYOUTS["int8"].fixed == {"bits": 8}
    assert SYNTAX.startswith("static[:CAPACITY], dynamic[:CAPACITY], rotating:WINDOW[+SINKS], paged[:PAGE_SIZE[:CAPA")


def test_a_pinned_capacity_is_kept_and_another_follows_the_tokens():
    assert [fit_cache(SMALL, "static:40", 1, tokens).capacity for tokens in (3, 30)] == [40, 40]
    assert [fit_cache(SMALL, "static", 1, tokens).capacity for tokens in (3, 30)] == [16, 32]
    assert fit_cache(SMALL, "paged:8:40", 1, 3, codec="int8").codec.name == "int8"
    with pytest.raises(CacheError, match=r"cache: expected static\[:CAPACITY\], .*; got 'rotating'"):
        fit_cache(SMALL, "rotating", 1, 3)


WRONG = """
    Static static: static:4:4 rotating rotating: rotating:a rotating:4+ rotating:-4 rotating:4+-1 rotating:٣ paged:
    paged:1.5 int16 int8:4:4
"""


@pytest.mark.parametrize("spec", ["", " static", "static\n", *WRONG.split()])
def test_unknown_specifications_are_refused(spec):
    with pytest.raises(CacheError, match=r"cache: expected static\[:CAPACITY\], .* got"):
        parse_cache_spec(spec)


def test_impossible_settings_are_refused():
    with pytest.raises(CacheError, match="window from 1 to 2147483647 in 'rotating:0', got 0"):
        parse_cache_spec("rotating:0")
    with pytest.raises(CacheError, match="capacity from 1 to 2147483647 in 'static:99999999999', got 99999999999"):
        parse_cache_spec("static:99999999999")
    with pytest.raises(CacheError, match="page_size from 1 to 2147483647 in 'paged:0'"):
        parse_cache_spec("paged:0")
    with pytest.raises(CacheError, match="window: expected a value, which RotatingCache requires"):
        plan_memory(SMALL, "rotating")
    with pytest.raises(
        CacheError, match="window: StaticCache has batch_size, capacity, dtype, codec, residual; got window=3"
    ):
        plan_memory(SMALL, window=3)
    with pytest.raises(CacheError, match="capacity: RotatingCache has batch_size, window"):
        plan_memory(SMALL, "rotating:4", capacity=9)
    with pytest.raises(CacheError, match=r"dtype: QuantizedCache has .* got dtype='bfloat16'"):
        plan_memory(SMALL, "int8", dtype="bfloat16")
    with pytest.raises(CacheError, match="cache: expected a name or a KVCache class, got a type"):
        plan_memory(SMALL, int)
    with pytest.raises(CapacityError, match="n_positions=64, got 65"):
        plan_memory(SMALL, capacity=65)
    with pytest.raises(CacheError, match="codec: expected one of float32, bfloat16, float16, int8, int4; got 'int2'"):
        plan_memory(SMALL, codec="int2")
    with pytest.raises(CacheError, match="residual: expected 0 with float32, which is exact anyway, got 4"):
        plan_memory(SMALL, residual=4)
    assert plan_memory(SMALL, "rotating", window=4).slots == 4


def held_in(cache) -> list[int]:
    """Where keys and values lie in memory."""
    return pointers((cache.keys, cache.values))


@pytest.mark.parametrize("spec", SPECS)
def test_released_buffers_are_handed_out_again(spec):
    pool, (cls, settings) = CachePool(), parse_cache_spec(spec)
    cache = pool.acquire(cls, SMALL, batch_size=3, **settings)
    batch = make_batch([5, 3, 12])
    expected, cache = feed(SMALL, cache, batch, in_chunks(batch.lengths, 16), step=append_owned)
    where, size = held_in(cache), cache.memory_usage()
    pool.release(cache)
    assert pool.memory_usage() == size
    again = pool.acquire(cls, SMALL, batch_size=3, **settings)
    assert held_in(again) == where
    assert again.lengths.tolist() == [0, 0, 0]
    assert pool.memory_usage() == 0
    logits, _ = feed(SMALL, again, batch, in_chunks(batch.lengths, 16), step=append_owned)
    assert np.array_equal(logits, expected, equal_nan=True)


def test_only_caches_that_fit_are_handed_out():
    pool = CachePool()
    pool.release(StaticCache.init(SMALL, batch_size=2, capacity=32))
    kept = pool.memory_usage()
    for settings in ({"capacity": 16}, {"batch_size": 1}, {"dtype": "bfloat16"}, {}):
        cache = pool.acquire(StaticCache, SMALL, **{"batch_size": 2, "capacity": 32, **settings} if settings else {})
        assert cache.memory_usage() != kept
        assert pool.memory_usage() == kept
    assert type(pool.acquire(DynamicCache, SMALL, batch_size=2, capacity=32)) is DynamicCache
    pool.acquire(StaticCache, SMALL, capacity=32, batch_size=2, dtype=np.float32)
    assert pool.memory_usage() == 0


def test_a_grown_dynamic_cache_stays_grown():
    pool = CachePool()
    grown = DynamicCache.init(SMALL).reserve(40)
    where = pointers(grown)
    pool.release(grown)
    again = pool.acquire(DynamicCache, SMALL)
    assert (pointers(again), again.slots) == (where, 48)


def test_generation_with_a_pool_is_the_same():
    pool, params, prompt = CachePool(), make_params(SMALL), make_batch([6], seed=2).tokens[:, :6]
    results = []
    for _ in range(3):
        cache = pool.acquire(StaticCache, SMALL, capacity=32)
        tokens, cache = decoding.generate_tokens(params, SMALL, prompt, 8, cache)
        results.append(tokens.tolist())
        pool.release(cache)
    assert results[0] == results[1] == results[2]


def test_released_and_donated_caches_cannot_be_used():
    pool = CachePool()
    cache = StaticCache.init(SMALL)
    _, after = decoding.decode_step(make_params(SMALL), SMALL, np.array([1]), cache)
    with pytest.raises(CacheError, match="this one was donated to a later step or released before"):
        pool.release(cache)
    pool.release(after)
    with pytest.raises(CacheError, match="released before"):
        pool.release(after)
    with pytest.raises(RuntimeError, match="deleted"):
        after.keys[0] + 1
    with pytest.raises(CacheError, match="traced"):
        jax.jit(pool.release)(StaticCache.init(SMALL))


def test_limit_and_drop():
    size = plan_memory(SMALL).total
    pool = CachePool(max_bytes=2 * size)
    for _ in range(3):
        pool.release(StaticCache.init(SMALL))
    assert pool.memory_usage() == 2 * size
    pool.drop()
    assert pool.memory_usage() == 0


def test_threads_never_get_the_same_buffers():
    pool = CachePool()
    for _ in range(2):
        pool.release(StaticCache.init(SMALL))
    held, clashes, lock = set(), [], threading.Lock()

    def work():
        for _ in range(50):
            cache = pool.acquire(StaticCache, SMALL)
            where = set(pointers(cache))
            with lock:
                clashes.extend(held & where)
                held.update(where)
            with lock:
                held.difference_update(where)
            pool.release(cache)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
