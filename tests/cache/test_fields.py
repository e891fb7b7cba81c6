"""Caches whose fields do not fit each other are found out; those that operations make never are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.errors import CacheError

CONFIG = lj.GPT2Config(vocab_size=97, n_positions=32, n_embd=8, n_layer=2, n_head=2)
SPECS = ["static", "dynamic", "rotating:6+2", "paged:4", "int8", "int4"]
EVICTING = ["recent:6", "h2o:6", "snapkv:8"]


CACHES = {
    **{spec: (spec, {}) for spec in SPECS},
    **{spec: (spec, {"slack": 2}) for spec in EVICTING},
    "paged:4 int4": ("paged:4", {"codec": "int4", "residual": 3}),
    "rotating:6+2 bfloat16": ("rotating:6+2", {"dtype": "bfloat16"}),
}


@functools.cache
def filled(name):
    """Two rows of 11 and 7 tokens, by steps, so that rings turn and policies evict."""
    spec, settings = CACHES[name]
    cache = lj.make_cache(CONFIG, spec, batch_size=2, **settings)
    keys = np.random.default_rng(0).standard_normal((11, 2, 1, 2, 4)).astype(np.float32)
    for step in range(11):
        count = np.array([1, step < 7], np.int32)
        cache = stepped(cache.reserve(count), keys[step], count)
    return cache


@jax.jit
def stepped(cache, keys, count):
    for layer in range(2):
        cache = cache.update(layer, keys, keys, count)
    return cache.advance(count)


def refused(cache, message=""):
    with pytest.raises(CacheError, match=message or None) as caught:
        cache.check_fields()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", CACHES)
def test_caches_that_operations_make_pass(name):
    cache = filled(name)
    cache.check_fields()
    cache.clear().check_fields()
    cache.select(np.array([1, 0, 1])).check_fields()
    cache.free([0]).check_fields()
    if cache.keeps_all(11):  # else it cannot go back
        cache.crop(6).check_fields()
    lj.make_cache(CONFIG, name.split()[0]).check_fields()


def integers(cache):
    """Names of the fields of numbers, and how many arrays each has."""
    for field in dataclasses.fields(cache):
        value = getattr(cache, field.name)
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, jax.Array) and first.dtype == jnp.int32:
            yield field.name


def changed(cache, name, change):
    value = getattr(cache, name)
    return cache.replace(**{name: (change(value[0]), *value[1:]) if isinstance(value, tuple) else change(value)})


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("number", [-5, 1000, 2**31 - 1])
def test_numbers_out_of_range_are_refused(name, number):
    cache = filled(name)
    names = list(integers(cache))
    assert "lengths" in names
    for field in names:
        refused(changed(cache, field, lambda array: array.at[(0,) * array.ndim].set(number)))


@pytest.mark.parametrize("name", CACHES)
def test_arrays_of_other_shapes_and_dtypes_are_refused(name):
    cache = filled(name)
    for field in (*integers(cache), "keys", "values"):
        for change in (
            lambda leaf: leaf[:1] if leaf.shape[0] > 1 else jnp.concatenate([leaf, leaf]),
            lambda leaf: leaf[..., None],
            lambda leaf: leaf.astype(jnp.int16 if leaf.dtype != jnp.int16 else jnp.int32),
            lambda leaf: leaf[:0],
        ):
            refused(changed(cache, field, lambda value, change=change: jax.tree.map(change, value)))


@pytest.mark.parametrize("name", CACHES)
def test_layers_that_are_missing_are_refused(name):
    cache = filled(name)
    for field in dataclasses.fields(cache):
        value = getattr(cache, field.name)
        if isinstance(value, tuple) and value:
            refused(cache.replace(**{field.name: value[:1]}))
    refused(cache.replace(keys=(), values=()))


@pytest.mark.parametrize("name", CACHES)
def test_settings_out_of_range_are_refused(name):
    cache = filled(name)
    for setting in ("limit", "window", "sinks", "budget", "slack"):
        if hasattr(cache, setting):
            for number in (-1, 2**31) if setting != "slack" else (-1, 0):
                refused(cache.replace(**{setting: number}))
    refused(cache.replace(codec=dataclasses.replace(cache.codec, head_dim=0)))
    refused(cache.replace(codec=dataclasses.replace(cache.codec, head_dim=5)))


def test_a_page_twice_in_a_row_is_refused():
    cache = filled("paged:4")
    refused(cache.replace(tables=cache.tables.at[0, 1].set(cache.tables[0, 0])), "a page for each block")
    refused(cache.replace(tables=cache.tables.at[0, 0].set(-1)), r"tables\[0, 0\]: expected 0 \.\. \d+, got -1")


def test_positions_of_other_slots_are_refused():
    cache = filled("int8")
    recent = cache.recent[0]
    moved = recent.replace(positions=jnp.roll(recent.positions, 1, axis=1))
    refused(cache.replace(recent=(moved, cache.recent[1])), r"recent\[0\]\.positions: expected position p in slot p")
    order = filled("h2o:6")
    swapped = order.origins[0][..., ::-1]
    refused(order.replace(origins=(swapped, order.origins[1])), "origins")


def test_an_edited_file_is_refused(tmp_path):
    lj.save_cache(tmp_path / "file", filled("static").replace(lengths=jnp.asarray([-5, 3], jnp.int32)))
    with pytest.raises(CacheError, match=r"file: expected a cache .*lengths\[0\]: expected 0 \.\. 32, got -5"):
        lj.load_cache(tmp_path / "file")
