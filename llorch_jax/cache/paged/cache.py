"""PagedCache: pages of a common pool, block tables, and rows that share pages until one of them writes."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.attention import KVView
from llorch_jax.cache.base import KVCache, check_rows, check_sizes, cropped, replace_item
from llorch_jax.cache.codecs.floats import dtype_of, from_stored, to_stored, zeros
from llorch_jax.cache.paged.allocator import PageBook, PageStats, blocks
from llorch_jax.cache.paged.arrays import copy_pages, join_pools, write_pages
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError, CapacityError
from llorch_jax.tracing import is_concrete

PAGE_SIZE = 32


@struct.dataclass
class PagedCache(KVCache):
    """Keys and values in pages of a fixed size; a row's block table names its pages in order (Kwon et al. 2023, 4).

    A page belongs to all rows that name it, and is free when none does. `select` and `fork` therefore share pages
    without copying keys or values. Before a row writes into a page that others name too, it gets a copy of its own:
    `reserve` allocates the page on the host and notes what to copy, and the next jitted write of each layer copies
    (copy-on-write). So only the jitted step decides, by donating its cache or not, whether the pools are changed in
    place, and a cache that is held elsewhere stays valid as with every other layout. Note that a cache and what
    `reserve`, `crop`, `select` or `fork` made of it have the same pools: donating one invalidates all.

    In `jit`, no page can be allocated: rows that were selected or forked there must pass `reserve` before they write.

    Attributes:
        keys: L arrays [P, K, page_size, H]; bfloat16 as its bits, uint16; see `storage`.
        values: L arrays [P, K, page_size, H], likewise.
        tables: int32 [B, N], the page of each block of page_size positions; -1 behind a row's last page. N grows in
            few steps with the longest row: attention costs N * page_size slots per row.
        sources: int32 [L, B], page that a layer's next write copies into the row's last page first; -1 for none.
        lengths: int32 [B], tokens in each row.
        limit: the largest number of tokens of a row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    tables: jax.Array
    sources: jax.Array
    lengths: jax.Array
    limit: int = struct.field(pytree_node=False)
    shares_slots: ClassVar[bool] = True

    @classmethod
    def init(
        cls,
        config: GPT2Config,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: Any = "float32",
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            capacity: upper limit of tokens per row, at most `config.n_positions`, which is the default.
            page_size: slots per page; by default `PAGE_SIZE`, or the capacity where that is less.
            num_pages: pages in the pool, for all rows together; by default enough for every row to reach the
                capacity without sharing any.
            dtype: of keys and values as stored: float32, bfloat16 or float16. Attention computes in float32.

        Raises:
            CacheError: the batch size, page size, number of pages or dtype is impossible.
            CapacityError: the capacity is not in 1 .. n_positions.
        """
        capacity = config.n_positions if capacity is None else capacity
        check_sizes(config, batch_size, capacity)
        page_size = min(PAGE_SIZE, capacity) if page_size is None else page_size
        if type(page_size) is not int or not 1 <= page_size <= capacity:
            raise CacheError(f"page_size: expected a whole number in 1 .. capacity={capacity}, got {page_size!r}")
        num_pages = batch_size * blocks(capacity, page_size) if num_pages is None else num_pages
        if type(num_pages) is not int or num_pages < 1:
            raise CacheError(f"num_pages: expected a whole number from 1 up, got {num_pages!r}")
        shape = (num_pages, config.kv_heads, page_size, config.head_dim)
        layers = config.cache_layers
        return cls(
            keys=tuple(zeros(shape, dtype) for _ in range(layers)),
            values=tuple(zeros(shape, dtype) for _ in range(layers)),
            tables=jnp.full((batch_size, 1), -1, jnp.int32),
            sources=jnp.full((layers, batch_size), -1, jnp.int32),
            lengths=jnp.zeros(batch_size, jnp.int32),
            limit=capacity,
        )

    @property
    def batch_size(self) -> int:
        return self.tables.shape[0]

    @property
    def capacity(self) -> int:
        return self.limit

    @property
    def slots_in_jit(self) -> int:
        return min(self.limit, self.tables.shape[1] * self.page_size)

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return self.keys[0].shape[2]

    @property
    def num_pages(self) -> int:
        """Pages of the pool P."""
        return self.keys[0].shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values: float32, bfloat16 or float16."""
        return dtype_of(self.keys[0])

    @property
    def layout(self) -> tuple[int, int, int]:
        _, heads, _, head_dim = self.keys[0].shape
        return len(self.keys), heads, head_dim

    def check_room(self, count: Any) -> None:
        """Raises CapacityError where a row has no room for `count` more tokens, or where pages for them are missing.

        When it passes, `reserve` finds the pages for these tokens, even if it is called for a few of them at a time.
        """
        super().check_room(count)
        if is_concrete(self, count):
            self._book().check(count)

    def reserve(self, count: Any) -> Self:
        """Allocates pages for `count` (int or int32 [B]) more tokens per row, and copies for those that write.

        Only the tables change: the result has the pools of this cache. Call it on the host; in `jit` it does nothing.

        Raises:
            CapacityError: a row would be longer than the capacity, or there are too few free pages.
        """
        super().check_room(count)
        if not is_concrete(self, count):
            return self
        book = self._book()
        tables, sources = book.reserve(count)
        if np.array_equal(tables, book.tables):
            return self
        return self.replace(
            tables=jnp.array(tables),
            sources=jnp.where(jnp.asarray(sources != book.sources)[None], jnp.asarray(sources)[None], self.sources),
        )

    def room(self, active: Any = None) -> int:
        return self._book().room(active)

    def page_stats(self) -> PageStats:
        """How the pages are used. Host only."""
        return self._book().stats()

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        batch, new = k.shape[:2]
        count = jnp.broadcast_to(jnp.asarray(new if count is None else count, jnp.int32), (batch,))

        def write(pool: jax.Array, tokens: jax.Array) -> jax.Array:
            pool = copy_pages(pool, self.sources[layer], self._last_pages())
            return write_pages(pool, to_stored(tokens, pool), self.tables, self.lengths, count)

        return self.replace(
            keys=replace_item(self.keys, layer, write(self.keys[layer], k)),
            values=replace_item(self.values, layer, write(self.values[layer], v)),
            sources=self.sources.at[layer].set(-1),
        )

    def read(self, layer: int) -> KVView:
        # Columns without a page show page 0: positions behind a row's end, which causality masks.
        pages = jnp.maximum(self._before_copies(self.sources[layer]), 0)

        def gather(pool: jax.Array) -> jax.Array:
            found = pool.at[pages].get(mode="promise_in_bounds").swapaxes(1, 2)  # [B, K, N, page_size, H]
            return from_stored(found.reshape(*found.shape[:2], -1, found.shape[4]))

        slots = self.tables.shape[1] * self.page_size
        return KVView(gather(self.keys[layer]), gather(self.values[layer]), jnp.arange(slots, dtype=jnp.int32)[None])

    def advance(self, count: Any) -> Self:
        if is_concrete(self, count):
            self._check_written(count)
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def crop(self, length: Any) -> Self:
        """Rolls back to the first `length` tokens, an int or int32 [B]; shorter rows stay as they are.

        Pages behind the new ends become free. In `jit` the rows keep them for the tokens that will follow; but a row
        that is cropped there to an earlier page, which others may share, must pass `reserve` before it writes.
        """
        lengths = cropped(self.lengths, length)
        tables = self._before_copies(jnp.max(self.sources, axis=0))
        if is_concrete(self, length):
            tables = _without_reserve(tables, lengths, self.page_size)
            return self.replace(tables=tables, sources=jnp.full_like(self.sources, -1), lengths=lengths)
        same_page = lengths // self.page_size == self.lengths // self.page_size  # its copy may still be to be made
        return self.replace(
            tables=jnp.where(same_page[:, None], self.tables, tables),
            sources=jnp.where(same_page[None], self.sources, -1),
            lengths=lengths,
        )

    def free_rows(self, rows: Any) -> Self:
        """The cache with these rows, int [R], empty and their pages free unless other rows share them."""
        index = check_rows(rows, self.batch_size)
        return self.crop(jnp.full(self.batch_size, self.limit, jnp.int32).at[index].set(0))

    def select(self, rows: Any) -> Self:
        """A cache whose rows are the given rows of this one, int [B']; rows may repeat, move or be left out.

        The pools are those of this cache, unchanged: repeated rows share all pages, those left out give theirs back.
        """
        index = check_rows(rows, self.batch_size)
        return self.replace(
            tables=jnp.take(self._filled_tables(), index, axis=0),
            sources=jnp.full((len(self.keys), index.size), -1, jnp.int32),
            lengths=jnp.take(self.lengths, index),
        )

    def join(self, others: Sequence[Self]) -> Self:
        """As `KVCache.join`. Host only.

        Caches of one pool, as after `split`, go on sharing it. Of other pools the pages that rows name are put into a
        new one, with as many free pages as there were, but no more than all rows could ever use.

        Raises:
            CacheError: the caches differ in page size, capacity, dtype or layout, or are traced.
        """
        if not is_concrete(self, others):
            raise CacheError("concat: expected paged caches outside jit, got traced ones")
        caches = (self, *others)
        for number, cache in enumerate(caches):
            expected, got = (
                f"page_size={each.page_size}, capacity={each.limit}, {each.dtype} and layout {each.layout}"
                for each in (self, cache)
            )
            if expected != got:
                raise CacheError(f"concat: expected paged caches of {expected}, got {got} in caches[{number}]")
        rows = [cache._filled_tables() for cache in caches]
        most = sum(cache.batch_size for cache in caches) * blocks(self.limit, self.page_size)
        keys, values, tables = join_pools([(cache.keys, cache.values) for cache in caches], rows, most)
        return self.replace(
            keys=keys,
            values=values,
            tables=tables,
            sources=jnp.full((len(keys), tables.shape[0]), -1, jnp.int32),
            lengths=jnp.concatenate([cache.lengths for cache in caches]),
        )

    def _book(self) -> PageBook:
        return PageBook(
            tables=np.asarray(self.tables),
            sources=np.asarray(self.sources).max(axis=0),
            lengths=np.asarray(self.lengths),
            page_size=self.page_size,
            num_pages=self.num_pages,
            capacity=self.limit,
        )

    def _check_written(self, count: Any) -> None:
        """Raises where `advance` would count tokens that cannot have been written."""
        super().check_room(count)
        count = np.broadcast_to(np.asarray(count), self.lengths.shape)
        ends = np.sum(np.asarray(self.tables) >= 0, axis=1) * self.page_size
        for row in np.flatnonzero(np.asarray(self.lengths) + count > ends):
            raise CapacityError(
                f"cache: row {row} has pages for {ends[row]} tokens, {self.lengths[row]} of them taken, and was to be "
                f"advanced by {count[row]}; update it first"
            )
        unwritten = np.argwhere((np.asarray(self.sources) >= 0) & (count > 0))
        if unwritten.size:
            raise CacheError(f"advance: row {unwritten[0, 1]} was not updated in layer {unwritten[0, 0]}")

    def _last_pages(self) -> jax.Array:
        """int32 [B], the page that the next token of each row falls into, or any page where there is none."""
        column = jnp.minimum(self.lengths // self.page_size, self.tables.shape[1] - 1)
        return jnp.maximum(jnp.take_along_axis(self.tables, column[:, None], axis=1)[:, 0], 0)

    def _filled_tables(self) -> jax.Array:
        """The tables of what rows hold, without pages reserved or to be copied."""
        tables = self._before_copies(jnp.max(self.sources, axis=0))
        return _without_reserve(tables, self.lengths, self.page_size)

    def _before_copies(self, sources: jax.Array) -> jax.Array:
        """The tables with the shared page, sources int32 [B], where its copy has not been made yet."""
        columns = jnp.arange(self.tables.shape[1], dtype=jnp.int32)[None]
        last = (columns == (self.lengths // self.page_size)[:, None]) & (sources >= 0)[:, None]
        return jnp.where(last, sources[:, None], self.tables)


def _without_reserve(tables: jax.Array, lengths: jax.Array, page_size: int) -> jax.Array:
    """Tables int32 [B, N] without the pages behind the rows' ends."""
    columns = jnp.arange(tables.shape[1], dtype=jnp.int32)[None]
    return jnp.where(columns < blocks(lengths, page_size)[:, None], tables, -1)
