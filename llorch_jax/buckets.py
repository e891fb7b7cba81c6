"""Sizes to which shapes are rounded up, so that requests of many lengths share few compiled programs."""

SMALLEST = 16


def bucket(size: int, limit: int | None = None) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that is at least `size`, or `limit` if that is less.

    Powers of two and 1.5 times these waste at most a half, on average a fifth.
    """
    power = SMALLEST
    while power < size:
        power *= 2
    rounded = power * 3 // 4 if power > SMALLEST and size <= power * 3 // 4 else power
    return rounded if limit is None else min(rounded, limit)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0
