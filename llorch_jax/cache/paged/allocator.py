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
        used: pages in the tables of some row, whether they hold tokens or are reserved for the next ones.
        shared: pages in the tables of several rows.
        free: pages in no row's table.
        tokens: tokens of all rows; a shared token counts in each row.
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
class PageAllocator:
    """Allocates pages for a snapshot of a paged cache's block tables. Immutable: `reserve` returns new tables.

    Reference counts are not stored but counted from the tables, so they cannot become inconsistent.

    Attributes:
        tables: int32 [B, N], page of each block of page_size positions; -1 after a row's last page.
        sources: int32 [B], page that is copied into the row's last one before the next write; -1 for none.
        lengths: int32 [B].
        pinned: int [M], pages that are not free although no row names them.
        page_size: slots per page.
        num_pages: number of pages in the pool P.
        capacity: maximum number of tokens per row.
        window: number of newest tokens to which the model attends, including the query's own; None for all.
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
        """int [B], number of pages of each row that hold tokens."""
        return blocks(self.lengths, self.page_size)

    @property
    def passed(self) -> np.ndarray:
        """int [B], number of leading pages of each row that its next query can no longer attend to."""
        return pages_passed(self.lengths, self.window, self.page_size)

    def references(self, tables: np.ndarray) -> np.ndarray:
        """int [P], number of rows that name each page."""
        return np.bincount(tables[tables >= 0], minlength=self.num_pages)

    def check(self, count: Any) -> None:
        """Raises CapacityError if there are too few pages for `count` (int or int [B]) more tokens at once."""
        self._check_pages(self._needs(count), count)

    def check_in_steps(self, count: Any) -> None:
        """Raises CapacityError if there are too few pages for `count` more tokens per row, a few at a time.

        With a window, the pages of tokens that have left it are reused for later ones.
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
            "free or crop rows, or make the cache with a larger num_pages"
        )

    def reserve(self, count: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tables int32 [B, N'] and sources int32 [B] with which every row has room for `count` more tokens.

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
        """int32 [count], free pages.

        Raises:
            CapacityError: there are fewer free pages.
        """
        free = self._free(self.tables)
        if free.size < count:
            self._raise_short(count, free.size)
        return free[:count]

    def room(self, active: Any = None) -> int:
        """How many tokens the active rows, bool [B], have room for: the slots after their ends in unshared pages."""
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
        np.maximum.at(taken, self.tables[named], slots[named])  # a shared page holds its tokens once
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
        """int [B], pages that each row needs with `count` more tokens."""
        return blocks(self.lengths + np.asarray(count), self.page_size)

    def _columns(self, ends: np.ndarray) -> int:
        """Width of tables for rows of `ends` pages: near the longest, but one of a few, as each width is compiled."""
        return int(blocks(bucket(int(ends.max()) * self.page_size, self.capacity), self.page_size))

    def _ends(self, owned: np.ndarray, count: Any) -> Iterator[np.ndarray]:
        """int [B], proposals of how many pages each row gets, the most generous first.

        With a spare page, all rows can continue for a whole page. If pages are short, the spare pages are dropped
        first; then rows give up pages that they do not need.
        """
        needs = self._needs(count)
        least = np.maximum(needs, ends_of(owned))
        writing = np.asarray(count) > 0
        ahead = self._needs(np.where(writing, np.maximum(count, self.page_size), 0))
        yield np.maximum(least, np.minimum(ahead, self._columns(least)))
        yield least
        yield needs

    def _free(self, tables: np.ndarray) -> np.ndarray:
        """The pages that these tables do not name and that no pending copy needs, in order."""
        references = self.references(tables)
        references[self.sources[self.sources >= 0]] += 1
        references[self.pinned] += 1
        return np.flatnonzero(references == 0).astype(np.int32)

    def _live(self) -> np.ndarray:
        """The tables without pages that have left the window."""
        columns = np.arange(self.tables.shape[1])
        return np.where(columns >= self.passed[:, None], self.tables, -1)

    def _owned(self) -> np.ndarray:
        """The live tables without pages after a row's end that other rows share."""
        columns = np.arange(self.tables.shape[1])
        foreign = (columns >= self.filled[:, None]) & (self.references(self.tables)[self.tables] > 1)
        foreign &= self.tables >= 0
        return keep(self._live(), np.where(foreign.any(axis=1), foreign.argmax(axis=1), columns.size))

    def _last(self) -> np.ndarray:
        """int32 [B], the page of the next token if it already holds tokens, or -1."""
        column = np.minimum(self.lengths // self.page_size, self.tables.shape[1] - 1)
        page = self.tables[np.arange(column.size), column]
        return np.where(self.lengths % self.page_size > 0, page, -1)

    def _copying(self, count: Any) -> np.ndarray:
        """bool [B], rows that need a copy of their last page, because they will write into it and others share it.

        If all of these rows write, the longest keeps the page: it writes after the tokens of the others.
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
    """Number of pages needed for `tokens` tokens."""
    return -(-tokens // page_size)


def pages_passed(lengths: np.ndarray, window: int | None, page_size: int) -> np.ndarray:
    """int [B], number of leading pages of each row that lie before the tokens that its next query can attend to."""
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
    """Tables with `columns` columns; columns that are cut off must be empty."""
    more = max(columns - tables.shape[1], 0)
    return np.pad(tables, ((0, 0), (0, more)), constant_values=-1)[:, :columns]
