"""Host-side bookkeeping of a paged cache, in NumPy: which pages are free, shared, or to be copied before a write."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llorch_jax.buckets import bucket
from llorch_jax.cache.room import active_rows
from llorch_jax.errors import CapacityError


@dataclasses.dataclass(frozen=True)
class PageStats:
    """How the pages of a cache are used.

    Attributes:
        page_size: slots per page.
        total: pages of the pool.
        used: pages that some row names, whether they hold tokens or are reserved for the next ones.
        shared: pages that several rows name.
        free: pages that no row names.
        tokens: tokens of all rows; a shared one counts in each row.
        wasted: slots of used pages that hold no token (internal fragmentation).
    """

    page_size: int
    total: int
    used: int
    shared: int
    free: int
    tokens: int
    wasted: int


@dataclasses.dataclass(frozen=True)
class PageBook:
    """A paged cache's block tables as they are now. Nothing here changes: `reserve` returns new tables.

    Reference counts are not kept but counted from the tables, so that they cannot go wrong.

    Attributes:
        tables: int32 [B, N], page of each block of page_size positions; -1 after a row's last page.
        sources: int32 [B], page that is copied into the row's last one before the next write; -1 for none.
        lengths: int32 [B].
        pinned: int [M], pages that are not free although no row names them.
        page_size: slots per page.
        num_pages: pages of the pool P.
        capacity: the largest number of tokens of a row.
        window: how many of the newest tokens the model looks at, the query's own included; None for all.
    """

    tables: np.ndarray
    sources: np.ndarray
    lengths: np.ndarray
    pinned: np.ndarray
    page_size: int
    num_pages: int
    capacity: int
    window: int | None = None

    @property
    def filled(self) -> np.ndarray:
        """int [B], how many of a row's pages hold tokens."""
        return blocks(self.lengths, self.page_size)

    @property
    def passed(self) -> np.ndarray:
        """int [B], how many of a row's first pages lie before all that its next query can look at."""
        return pages_passed(self.lengths, self.window, self.page_size)

    def references(self, tables: np.ndarray) -> np.ndarray:
        """int [P], how many rows name each page."""
        return np.bincount(tables[tables >= 0], minlength=self.num_pages)

    def check(self, count: Any) -> None:
        """Raises CapacityError where there are too few pages for `count` (int or int [B]) more tokens at once."""
        self._check_pages(self._needs(count), count)

    def check_in_steps(self, count: Any) -> None:
        """Raises CapacityError where there are too few pages for `count` more tokens per row, a few at a time.

        With a window, the pages of tokens that have passed out of it serve for later ones.
        """
        needs = self._needs(count)
        if self.window is not None:
            most = self.passed + blocks(self.window, self.page_size) + 2
            needs = np.maximum(self.filled, np.minimum(needs, most))
        self._check_pages(needs, count)

    def _check_pages(self, needs: np.ndarray, count: Any) -> None:
        free = self._free(keep(self._live(), self.filled)).size
        needed = int(np.sum(needs - self.filled) + np.sum(self._copying(count)))
        if needed > free:
            self._raise_short(needed, free)

    def _raise_short(self, needed: int, free: int) -> None:
        raise CapacityError(
            f"cache: {needed} pages of {self.page_size} tokens are needed and {free} of {self.num_pages} are free; "
            "free rows, crop them, or make the cache with a larger num_pages"
        )

    def reserve(self, count: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tables int32 [B, N'] and sources int32 [B] with which every row can be given `count` more tokens.

        Raises:
            CapacityError: there are too few pages.
        """
        self.check(count)
        copying = self._copying(count)
        owned = self._owned()
        for ends in self._ends(owned, count):
            tables = keep(widen(owned, self._columns(ends)), ends)
            columns = np.arange(tables.shape[1])
            missing = (columns >= self.passed[:, None]) & (columns < ends[:, None]) & (tables < 0)
            free = self._free(tables)
            if missing.sum() + copying.sum() <= free.size:
                break
        fresh, rest = np.split(free, [missing.sum()])
        tables[missing] = fresh
        rows = np.flatnonzero(copying)
        last = self.lengths[rows] // self.page_size
        sources = self.sources.copy()
        sources[rows] = tables[rows, last]
        tables[rows, last] = rest[: rows.size]
        return tables, sources

    def free_pages(self, count: int) -> np.ndarray:
        """int32 [count], pages that nothing names.

        Raises:
            CapacityError: there are fewer.
        """
        free = self._free(self.tables)
        if free.size < count:
            self._raise_short(count, free.size)
        return free[:count]

    def room(self, active: Any = None) -> int:
        """How many tokens the active rows, bool [B], can be given: the slots of their own pages after their ends."""
        owned = self._owned()
        references = self.references(self.tables)
        ends = np.minimum(ends_of(owned) * self.page_size, self.capacity)
        last = self._last()
        shared = (last >= 0) & (references[last] > 1)
        return int(np.min(active_rows(np.where(shared, 0, ends - self.lengths), active)))

    def stats(self) -> PageStats:
        """How the pages are used."""
        references = self.references(self.tables)
        used = self.num_pages - self._free(self.tables).size
        slots = np.clip(self.lengths[:, None] - np.arange(self.tables.shape[1]) * self.page_size, 0, self.page_size)
        named = self.tables >= 0
        taken = np.zeros(self.num_pages, np.int64)
        np.maximum.at(taken, self.tables[named], slots[named])  # a page that rows share holds its tokens once
        return PageStats(
            page_size=self.page_size,
            total=self.num_pages,
            used=used,
            shared=int(np.sum(references > 1)),
            free=self.num_pages - used,
            tokens=int(self.lengths.sum()),
            wasted=int(used * self.page_size - taken.sum()),
        )

    def _needs(self, count: Any) -> np.ndarray:
        """int [B], pages per row with `count` more tokens."""
        return blocks(self.lengths + np.asarray(count), self.page_size)

    def _columns(self, ends: np.ndarray) -> int:
        """Width of tables for rows of so many pages: few widths, as each is compiled, but near the longest row."""
        return int(blocks(bucket(int(ends.max()) * self.page_size, self.capacity), self.page_size))

    def _ends(self, owned: np.ndarray, count: Any) -> Iterator[np.ndarray]:
        """int [B], how many pages each row may have in the end, the most generous proposal first.

        With a page in reserve all rows can go on for a whole page. When pages are short, first that reserve is left
        out, and then pages are taken from rows that have some without need.
        """
        needs = self._needs(count)
        least = np.maximum(needs, ends_of(owned))
        writing = np.asarray(count) > 0
        ahead = self._needs(np.where(writing, np.maximum(count, self.page_size), 0))
        yield np.maximum(least, np.minimum(ahead, self._columns(least)))
        yield least
        yield needs

    def _free(self, tables: np.ndarray) -> np.ndarray:
        """The pages that neither these tables name nor a copy still needs, in order."""
        references = self.references(tables)
        references[self.sources[self.sources >= 0]] += 1
        references[self.pinned] += 1
        return np.flatnonzero(references == 0).astype(np.int32)

    def _live(self) -> np.ndarray:
        """The tables without pages that have passed out of the window."""
        columns = np.arange(self.tables.shape[1])
        return np.where(columns >= self.passed[:, None], self.tables, -1)

    def _owned(self) -> np.ndarray:
        """The live tables without pages after a row's end that other rows name too."""
        columns = np.arange(self.tables.shape[1])
        foreign = (columns >= self.filled[:, None]) & (self.references(self.tables)[self.tables] > 1)
        foreign &= self.tables >= 0
        return keep(self._live(), np.where(foreign.any(axis=1), foreign.argmax(axis=1), columns.size))

    def _last(self) -> np.ndarray:
        """int32 [B], the page that the next token falls into, where it holds tokens already, or -1."""
        column = np.minimum(self.lengths // self.page_size, self.tables.shape[1] - 1)
        page = self.tables[np.arange(column.size), column]
        return np.where(self.lengths % self.page_size > 0, page, -1)

    def _copying(self, count: Any) -> np.ndarray:
        """bool [B], rows that need their own copy of their last page, as they are to write into it and others name it.

        Where all of these write, the longest keeps the page: what it writes lies after the tokens of the others.
        """
        writing = np.broadcast_to(np.asarray(count) > 0, self.lengths.shape)
        last = np.where(writing, self._last(), -1)
        references = self.references(keep(self.tables, self.filled))
        copying = (last >= 0) & (references[last] > 1)
        for page in np.unique(last[copying]):
            rows = np.flatnonzero(last == page)
            if rows.size == references[page]:
                copying[rows[np.argmax(self.lengths[rows])]] = False
        return copying


def blocks(tokens: Any, page_size: int) -> Any:
    """How many pages hold so many tokens."""
    return -(-tokens // page_size)


def pages_passed(lengths: np.ndarray, window: int | None, page_size: int) -> np.ndarray:
    """int [B], how many of a row's first pages lie before the tokens that its next query can look at."""
    if window is None:
        return np.zeros_like(lengths)
    return np.maximum(lengths - window + 1, 0) // page_size


def ends_of(tables: np.ndarray) -> np.ndarray:
    """int [B], one more than the last column of each row of tables [B, N] that names a page."""
    columns = np.arange(1, tables.shape[1] + 1)
    return np.max(np.where(tables >= 0, columns, 0), axis=1)


def keep(tables: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Tables [B, N] without the pages from column `ends` [B] on."""
    return np.where(np.arange(tables.shape[1]) < ends[:, None], tables, -1).astype(np.int32)


def widen(tables: np.ndarray, columns: int) -> np.ndarray:
    """Tables with so many columns; what they lose must be empty."""
    more = max(columns - tables.shape[1], 0)
    return np.pad(tables, ((0, 0), (0, more)), constant_values=-1)[:, :columns]
