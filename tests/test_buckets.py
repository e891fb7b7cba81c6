"""Buckets: which sizes share a compiled program."""

from hypothesis import given
from hypothesis import strategies as st

from llorch_jax.buckets import bucket


def test_the_sizes_up_to_gpt_2s_context():
    assert sorted({bucket(size) for size in range(1, 1025)}) == [
        16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024
    ]  # fmt: skip


@given(st.integers(0, 10**6))
def test_a_bucket_holds_its_size_and_wastes_at_most_a_half(size):
    rounded = bucket(size)
    assert size <= rounded
    assert rounded == 16 or rounded < 1.5 * size
    assert bucket(rounded) == rounded


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_limit_cuts_off(size, limit):
    assert bucket(size, limit) == min(bucket(size), limit)
