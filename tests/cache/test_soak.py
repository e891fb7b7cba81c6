"""Random operations over all layouts against a slow model in plain Python: equal contents, nothing leaked."""

import copy
import gc
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import make_config
from profiles import whole

from llorch_jax.attention import Queries
from llorch_jax.cache import concat, load_cache, make_cache, save_cache, split
from llorch_jax.cache.layouts import LAYOUTS
from llorch_jax.errors import CacheError, CapacityError

CONFIG = make_config(layers=2, heads=1, head_dim=2)
LIMIT, ROWS = CONFIG.n_positions, 3
OPERATIONS = whole(20_000, quick=2_800)
SLACK = {"slack": 3}
CASES = {  # a specification, and a codec where it is not the layout's own
    "static": {},
    "static bfloat16": {"residual": 5},
    "dynamic": {},
    "rotating:9+2": {},
    "rotating:9+2 int4": {"residual": 5},
    "paged:4": {"num_pages": 20},  # 48 for all rows at their longest: pages run out now and then
    "paged:4 int8": {"num_pages": 20, "residual": 5},
    "int8": {"residual": 5},
    "int4": {"residual": 5},
    "recent:9": SLACK,
    "sinks:9": SLACK,
    "h2o:9": SLACK,
    "h2o:9 int8": {**SLACK, "residual": 5},
    "snapkv:9": SLACK,
}
assert {re.split("[: ]", case)[0] for case in CASES} == LAYOUTS.keys(), "a new layout needs a case here"
# Relative to the range of the two numbers of a vector.
TOLERANCE = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.6 / 127, "int4": 0.6 / 15}


def append(cache, numbers, count):
    """Writes numbers [B, T] as keys (x, x / 2), offset by layer, and their negatives as values."""
    k = jnp.stack([numbers, numbers / 2], axis=-1)[:, :, None]
    for layer in range(2):
        cache, view = cache.append(layer, k + layer, -k, count)
        positions = cache.lengths[:, None] + jnp.arange(numbers.shape[1], dtype=jnp.int32)[None]
        cache = cache.observe(layer, jnp.zeros_like(k), view, Queries(positions, count), 1.0)  # all slots alike
    return cache.advance(count)


@partial(jax.jit, static_argnums=1)
def shown(cache, layer):
    """What a layer holds, as plain arrays."""
    return cache.read(layer).dense()


class Soak:
    """A cache, and lists of numbers that say what must be in it."""

    def __init__(self, case, folder):
        self.layout, _, codec = case.partition(" ")
        self.file = folder / "cache.safetensors"
        self.random = np.random.default_rng(sum(map(ord, case)))
        self.cache = make_cache(CONFIG, self.layout, batch_size=ROWS, codec=codec or None, **CASES[case])
        self.rows = [[] for _ in range(ROWS)]
        self.number, self.refused = 0, 0
        self.steps = jax.jit(append), jax.jit(append, donate_argnames="cache")
        self.parent = None  # an earlier cache that must stay valid, with its rows

    def append(self):
        width = int(self.random.choice([1, 1, 4]))
        count = self.random.integers(0, width + 1, ROWS).astype(np.int32)
        numbers = (self.number + np.arange(ROWS * width, dtype=np.float32).reshape(ROWS, width)) % 997
        self.number += ROWS * width
        try:
            cache = self.cache.reserve(count)
        except CapacityError:
            self.refused += 1
            full = max(len(row) + n for row, n in zip(self.rows, count, strict=True)) > LIMIT
            assert full or self.layout.startswith("paged")
            return self.crop()
        owned = bool(self.random.random() < 0.5)
        if owned:
            self.parent = None  # it may have the buffers that are donated
        elif self.random.random() < 0.1:
            self.parent = self.cache, copy.deepcopy(self.rows)
        self.cache = self.steps[owned](cache, jnp.asarray(numbers), jnp.asarray(count))
        for row, new, n in zip(self.rows, numbers, count, strict=True):
            row.extend(new[:n].tolist())

    def crop(self):
        lengths = np.array([self.random.integers(0, len(row) + 1) for row in self.rows], np.int32)
        try:
            self.cache = self.cache.crop(lengths)
        except CacheError:  # a layout that drops tokens cannot go back everywhere
            assert not self.lossless
            lengths[:] = 0
            self.cache = self.cache.clear()
        self.rows = [row[:n] for row, n in zip(self.rows, lengths, strict=True)]

    def select(self):
        rows = self.random.integers(0, ROWS, ROWS)
        self.cache, self.rows = self.cache.select(rows), [list(self.rows[row]) for row in rows]

    def fork(self):
        row = int(self.random.integers(ROWS))
        self.cache, self.rows = self.cache.select([row]).fork(ROWS), [list(self.rows[row]) for _ in range(ROWS)]

    def rejoin(self):
        one, two = split(self.cache, [1, 2])
        self.cache, self.rows = concat([two, one]), [*self.rows[1:], self.rows[0]]

    def store(self):
        save_cache(self.file, self.cache)
        self.cache = load_cache(self.file)

    def free(self):
        row = int(self.random.integers(ROWS))
        self.cache = self.cache.free([row])
        self.rows[row] = []

    def insert(self):
        """A row in place of another one."""
        source, slot = self.random.integers(0, ROWS, 2).tolist()
        self.cache = self.cache.insert([slot], self.cache.select([source]))
        self.rows[slot] = list(self.rows[source])

    @property
    def lossless(self):
        return self.layout.split(":")[0] in ("static", "dynamic", "paged", "int8", "int4")

    def check(self, cache, rows):
        """Every token held is the right one; a layout that drops some holds those that it must."""
        assert np.asarray(cache.lengths).tolist() == [len(row) for row in rows]
        for layer in range(2):
            view = jax.tree.map(np.asarray, shown(cache, layer))
            for row, numbers in enumerate(rows):
                positions = view.positions[row % len(view.positions)]
                positions = positions if positions.ndim == 1 else positions[0]
                slots = np.flatnonzero((positions >= 0) & (positions < len(numbers)))
                held = positions[slots]
                assert len(set(held)) == held.size
                self.check_held(set(held.tolist()), len(numbers))
                expected = np.array([[numbers[p], numbers[p] / 2] for p in held], np.float32).reshape(-1, 2)
                room = TOLERANCE[cache.codec.name] * (np.abs(expected).max(1, keepdims=True) + 1)
                assert np.all(np.abs(view.k[row, 0, slots] - layer - expected) <= room)
                assert np.all(np.abs(view.v[row, 0, slots] + expected) <= room)

    def check_held(self, held, length):
        if self.lossless:
            assert held == set(range(length))
        elif self.layout.startswith("rotating"):
            assert held >= {*range(min(2, length)), *range(max(0, length - 8), length)}
        else:
            newest = 4 if self.layout.startswith(("h2o", "snapkv")) else 5
            assert min(length, 9) <= len(held) <= 9 + 4  # a budget of 9, and up to 4 tokens at once
            assert held >= set(range(max(0, length - newest), length))

    def run(self, operations):
        kinds = [self.append, self.crop, self.select, self.fork, self.rejoin, self.store, self.free, self.insert]
        for step in range(operations):
            kinds[self.random.choice(len(kinds), p=[0.83, 0.04, 0.04, 0.03, 0.025, 0.005, 0.01, 0.02])]()
            if step % 16 == 0:
                self.check(self.cache, self.rows)
                if self.parent:
                    self.check(*self.parent)
        self.check(self.cache, self.rows)


@pytest.mark.parametrize("case", CASES)
def test_random_operations_equal_a_slow_model(case, tmp_path):
    soak = Soak(case, tmp_path)
    soak.run(200)
    gc.collect()
    arrays = len(jax.live_arrays())
    soak.run(OPERATIONS // len(CASES) - 200)
    soak.parent = None
    gc.collect()
    assert len(jax.live_arrays()) <= arrays + 2 * len(jax.tree.leaves(soak.cache))
    if soak.layout.startswith("paged"):
        assert soak.refused > 0
        stats = soak.cache.page_stats()
        assert stats.used <= sum(-(-len(row) // 4) + 1 for row in soak.rows)
        assert stats.total == 20
