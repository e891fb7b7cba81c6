"""Checks of a paged cache on the host: its fields, what was written, and what its window still needs."""

from typing import Any

import numpy as np

from llorch_jax.cache.fields import check_range, check_whole_numbers
from llorch_jax.cache.paged.allocator import blocks, ends_of, pages_passed
from llorch_jax.errors import CacheError, CapacityError
from llorch_jax.tracing import is_concrete


def check_pages(cache: Any) -> None:
    """Raises CacheError unless lengths, tables and pending copies are consistent with each other and the pool."""
    check_whole_numbers(cache, {"limit": cache.page_size} | ({} if cache.window is None else {"window": 1}))
    tables = np.asarray(cache.tables)
    lengths = np.asarray(cache.lengths)
    check_range("lengths", lengths, 0, cache._slots_for_tokens())
    columns = np.arange(tables.shape[1])
    passed = pages_passed(lengths, cache.window, cache.page_size)
    used = (columns >= passed[:, None]) & (columns < blocks(lengths, cache.page_size)[:, None])
    check_range("tables", tables, np.where(used, 0, -1), cache.num_pages - 1)
    check_range("sources", cache.sources, -1, cache.num_pages - 1)
    for row, pages in enumerate(tables):
        named = pages[pages >= 0]
        if len(np.unique(named)) < len(named):
            raise CacheError(f"tables[{row}]: expected a page for each block, got one page for several blocks")


def check_written(cache: Any, count: Any) -> None:
    """Raises an error if `advance` would count tokens that cannot have been written."""
    count = np.broadcast_to(np.asarray(count), cache.lengths.shape)
    ends = ends_of(np.asarray(cache.tables)) * cache.page_size
    for row in np.flatnonzero(np.asarray(cache.lengths) + count > ends):
        raise CapacityError(
            f"cache: row {row} has pages for {ends[row]} tokens, {cache.lengths[row]} of which are used, and cannot be "
            f"advanced by {count[row]}; update it first"
        )
    unwritten = np.argwhere((np.asarray(cache.sources) >= 0) & (count > 0))
    if unwritten.size:
        raise CacheError(f"advance: row {unwritten[0, 1]} was not updated in layer {unwritten[0, 0]}")


def check_intact(cache: Any, lengths: Any) -> None:
    """Raises CacheError if rows of `lengths` int [B] lack pages to which their next query attends."""
    if cache.window is None or not is_concrete(cache.tables, lengths):
        return
    known = np.asarray(lengths)
    tables = np.asarray(cache.tables)
    first = np.where((tables >= 0).any(axis=1), (tables >= 0).argmax(axis=1), 0)
    lost = (known > 0) & (pages_passed(known, cache.window, cache.page_size) < first)
    if lost.any():
        row = int(np.argmax(lost))
        raise CacheError(
            f"cache: row {row} cannot continue from {known[row]} tokens: pages before token "
            f"{first[row] * cache.page_size} have left the model's window of {cache.window} and been freed"
        )
