"""Sizes in bytes, as users write them."""

import pytest

from llorch_jax.cli.terminal import read_bytes
from llorch_jax.errors import EngineError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("500MB", 500 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        ("2g", 2 * 10**9),
        (" 0.1kB ", 100),
        ("1TiB", 2**40),
    ],
)
def test_sizes_with_and_without_units(text, count):
    assert read_bytes("size", text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "1 XB", "1.GB", "0x10", "inf", "1GB 2", "\u0661", "1iB", "9" * 30]
)
def test_other_sizes_are_refused_in_one_line(text):
    with pytest.raises(
        EngineError, match=r"^size: expected a number of bytes such as 500MB, 1\.5GiB or 0, got '"
    ) as caught:
        read_bytes("size", text)
    assert "\n" not in str(caught.value)
