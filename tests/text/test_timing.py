"""Stopwatch and timings."""

import time

import jax
import jax.numpy as jnp
import pytest

from llorch_jax.text.timing import Stopwatch, Timings, compile_seconds


def fresh_program():
    """A compiled function that no cache knows."""
    return jax.jit(lambda x: jnp.sin(x) * 3 + 1)


def test_milliseconds_per_token():
    assert Timings(compile=9.0, prefill=9.0, decode=0.5, new_tokens=6).ms_per_token == pytest.approx(100)
    assert Timings(compile=9.0, prefill=9.0, decode=0.0, new_tokens=1).ms_per_token == 0


def test_laps_add_up():
    watch, start = Stopwatch(), time.perf_counter()
    laps = []
    for seconds in (0.05, 0.1):
        time.sleep(seconds)
        laps.append(watch.lap())
    elapsed = time.perf_counter() - start
    assert laps[0] >= 0.05
    assert laps[1] >= 0.1
    assert sum(laps) == pytest.approx(elapsed, abs=0.02)
    assert watch.compile == 0


def test_compiling_is_taken_out_of_a_lap():
    watch, start = Stopwatch(), time.perf_counter()
    fresh_program()(jnp.zeros(3)).block_until_ready()
    lap = watch.lap()
    elapsed = time.perf_counter() - start
    assert 0 < watch.compile < elapsed
    assert lap + watch.compile == pytest.approx(elapsed, abs=0.02)


def test_a_compiled_program_adds_nothing():
    program = fresh_program()
    program(jnp.zeros(3))
    before, watch = compile_seconds(), Stopwatch()
    program(jnp.ones(3)).block_until_ready()
    watch.lap()
    program(jnp.zeros(4))
    assert before < compile_seconds()
    assert watch.compile == 0


def test_skipped_time_is_no_ones():
    watch = Stopwatch()
    time.sleep(0.1)
    fresh_program()(jnp.zeros(5))
    watch.skip()
    assert watch.lap() < 0.1
    assert watch.compile == 0
