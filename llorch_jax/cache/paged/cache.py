"""PagedCache: pages of a common pool, block tables, and rows that share pages until one of them writes."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.cache.axes import array, setting
from llorch_jax.cache.base import KVCache, replace_item
from llorch_jax.cache.codecs import Codec, Stored, make_codec, residual_of
from llorch_jax.cache.paged.allocator import PageAllocator, PageStats, blocks
from llorch_jax.cache.paged.arrays import copy_pages, of_all_rows, write_pages
from llorch_jax.cache.paged.checks import check_intact, check_pages, check_written
from llorch_jax.cache.paged.rows import insert_rows, join_rows
from llorch_jax.cache.paged.view import PagedView
from llorch_jax.cache.recent import Recent
from llorch_jax.cache.room import check_sizes, cropped
from llorch_jax.cache.static import empty_recent
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CacheError
from llorch_jax.tracing import is_concrete, whole

PAGE_SIZE = 32


@struct.dataclass(repr=False)
class PagedCache(KVCache):
    """Keys and values in pages of a fixed size; a row's block table names its pages in order (Kwon et al. 2023, 4).

    A page belongs to all rows that name it, and is free when none does. `select` and `fork` therefore share pages
    without copying keys or values. Before a row writes into a shared page, it gets a copy: `reserve` allocates the page
    on the host and records what to copy, and the next jitted write of each layer copies it (copy-on-write). So whether
    the pools are changed in place depends only on whether the jitted step donates its cache, as with every other
    layout. Note that a cache and the results of its `reserve`, `crop`, `select` and `fork` have the same pools:
    donating one invalidates all.

    In `jit`, no page can be allocated: rows that were selected or forked there need `reserve` before they write.

    Attributes:
        keys: for each of L layers, stored keys [P, K, page_size, ...].
        values: for each of L layers, stored values.
        tables: int32 [B, N], the page of each block of page_size positions; -1 after a row's last page. N grows in
            few steps with the longest row: attention is computed over N * page_size slots per row.
        sources: int32 [L, B], page that a layer's next write first copies into the row's last page; -1 for none.
        lengths: int32 [B], tokens in each row.
        recent, codec: as in `StaticCache`.
        limit: maximum number of tokens per row.
        window: the model's `sliding_window`; pages that have left it are freed.
    """

    keys: tuple[Stored, ...] = array("PKC")
    values: tuple[Stored, ...] = array("PKC")
    tables: jax.Array = array("BN")
    sources: jax.Array = array("LB")
    lengths: jax.Array = array("B")
    recent: tuple[Recent, ...] = ()
    codec: Codec = setting(kw_only=True)
    limit: int = setting(kw_only=True)
    window: int | None = setting(default=None, kw_only=True)
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
        codec: Any = None,
        residual: int | None = None,
    ) -> Self:
        """An empty cache.

        Args:
            config: the model's hyperparameters.
            batch_size: number of rows B.
            capacity: maximum number of tokens per row, at most `config.n_positions`, which is the default.
            page_size: slots per page; by default `PAGE_SIZE`, or the capacity if that is less.
            num_pages: number of pages in the pool, for all rows together; by default enough for every row to reach
                the capacity without sharing.
            dtype, codec, residual: how keys and values are stored; as in `StaticCache.init`.

        Raises:
            CacheError: the batch size, page size, number of pages, dtype, codec or residual is invalid.
            CapacityError: the capacity is not in 1 .. n_positions.
        """
        capacity = config.n_positions if capacity is None else capacity
        check_sizes(config, batch_size, capacity)
        page_size = min(PAGE_SIZE, capacity) if page_size is None else page_size
        page_size = whole("page_size", page_size, CacheError, most=capacity)
        num_pages = batch_size * blocks(capacity, page_size) if num_pages is None else num_pages
        num_pages = whole("num_pages", num_pages, CacheError, most=np.iinfo(np.int32).max)
        stored_as = make_codec(codec, config.head_dim, dtype)
        window = residual_of(stored_as, residual, capacity)
        leading = (num_pages, config.kv_heads, page_size)
        layers = config.cache_layers
        return cls(
            keys=tuple(stored_as.zeros(leading) for _ in range(layers)),
            values=tuple(stored_as.zeros(leading) for _ in range(layers)),
            tables=jnp.full((batch_size, 1), -1, jnp.int32),
            sources=jnp.full((layers, batch_size), -1, jnp.int32),
            lengths=jnp.zeros(batch_size, jnp.int32),
            recent=empty_recent(config, batch_size, window),
            codec=stored_as,
            limit=capacity,
            window=config.sliding_window,
        )

    @property
    def capacity(self) -> int:
        return self.limit

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return jax.tree.leaves(self.keys[0])[0].shape[2]

    @property
    def num_pages(self) -> int:
        """Number of pages in the pool P."""
        return jax.tree.leaves(self.keys[0])[0].shape[0]

    def check_fields(self) -> None:
        super().check_fields()
        check_pages(self)

    def keeps_all(self, tokens: int) -> bool:
        return self.window is None or tokens <= self.window

    def held_positions(self) -> jax.Array:
        """As `KVCache.held_positions`; slots of freed pages hold nothing."""
        positions = self.read(0).positions
        if self.window is None:
            return positions
        there = jnp.repeat(self._before_copies(self.sources[0]) >= 0, self.page_size, axis=1)
        return jnp.where(there, positions, -1)

    def _slots_for_tokens(self) -> int:
        return min(self.limit, self.tables.shape[1] * self.page_size)

    def check_room(self, count: Any, *, lengths: Any = None) -> None:
        """Raises CapacityError if a row has no room for `count` more tokens, or if there are too few pages for them.

        If it passes, `reserve` finds pages for these tokens, even if it is called for a few of them at a time.
        """
        super().check_room(count, lengths=lengths)
        if is_concrete(self, count):
            self.allocator(lengths).check_in_steps(count)

    def reserve(self, count: Any, *, lengths: Any = None, pinned: Any = ()) -> Self:
        """Allocates pages for `count` (int or int32 [B]) more tokens per row, and copies of shared pages for writers.

        Only the tables change: the result has the pools of this cache. Call it on the host; in `jit` it does nothing.

        Args:
            count: number of tokens.
            lengths: lengths of the rows, int [B], if the host knows them; the tables are always read from the device.
            pinned: pages, int [...], that are not free although no row names them.

        Raises:
            CapacityError: a row would be longer than the capacity, or there are too few free pages.
        """
        super().check_room(count, lengths=lengths)
        if not is_concrete(self, count):
            return self
        check_intact(self, self.lengths if lengths is None else lengths)
        allocator = self.allocator(lengths, pinned)
        tables, sources = allocator.reserve(count)
        if np.array_equal(tables, allocator.tables):
            return self
        changed = sources != allocator.sources
        return self.replace(
            tables=jnp.array(tables),
            sources=jnp.where(jnp.asarray(changed)[None], jnp.asarray(sources)[None], self.sources),
        )

    def room(self, active: Any = None) -> int:
        return self.allocator().room(active) if is_concrete(self.lengths) else self._slots_for_tokens()

    def page_stats(self) -> PageStats:
        """How the pages are used. Host only."""
        return self.allocator().stats()

    def _write(self, layer: int, k: jax.Array, v: jax.Array, count: Any) -> Self:
        rows = (self.tables, self.lengths, self._counts(k, count), self.sources[layer], self._last_pages())
        tables, lengths, counts, sources, last = of_all_rows(*rows)

        def write(pool: jax.Array, tokens: jax.Array) -> jax.Array:
            pool = copy_pages(pool, sources, last)
            return write_pages(pool, of_all_rows(tokens)[0], tables, lengths, counts)

        keys = jax.tree.map(write, self.keys[layer], self.codec.encode(k))
        values = jax.tree.map(write, self.values[layer], self.codec.encode(v))
        return self.replace(
            keys=replace_item(self.keys, layer, keys),
            values=replace_item(self.values, layer, values),
            sources=self.sources.at[layer].set(-1),
        )

    def read(self, layer: int) -> PagedView:
        # Columns without a page use page 0: their positions are after the row's end, and masked by causality.
        pages = jnp.maximum(self._before_copies(self.sources[layer]), 0)
        slots = self.tables.shape[1] * self.page_size
        positions = jnp.arange(slots, dtype=jnp.int32)[None]
        return PagedView(self.keys[layer], self.values[layer], pages, positions, self._exact(layer), codec=self.codec)

    def advance(self, count: Any) -> Self:
        if is_concrete(self, count):
            super().check_room(count)
            check_written(self, count)
        return self.replace(lengths=self.lengths + jnp.asarray(count, jnp.int32))

    def crop(self, length: Any) -> Self:
        """Rolls back to the first `length` tokens, an int or int32 [B]; shorter rows stay as they are.

        In a model with a sliding window, a row can be cropped as long as the pages to which its next query attends have
        not been freed, or to nothing. Pages after the new ends become free. In `jit` rows keep these pages for later
        tokens; but a row that is cropped there to an earlier page, which others may share, needs `reserve` before it
        writes.

        Raises:
            CacheError: pages that the shorter row needs have been freed. In `jit` this cannot be known: the next
                `reserve` raises it.
        """
        lengths = cropped(self.lengths, length)
        tables = self._before_copies(jnp.max(self.sources, axis=0))
        if is_concrete(self, length):
            check_intact(self, lengths)
            tables = _without_reserve(tables, lengths, self.page_size)
            return self.replace(tables=tables, sources=jnp.full_like(self.sources, -1), lengths=lengths)
        same_page = lengths // self.page_size == self.lengths // self.page_size  # its copy may still be pending
        return self.replace(
            tables=jnp.where(same_page[:, None], self.tables, tables),
            sources=jnp.where(same_page[None], self.sources, -1),
            lengths=lengths,
        )

    def select(self, rows: Any) -> Self:
        """A cache with the given rows of this one, int [B'], in that order; rows may be repeated or left out.

        The pools are those of this cache, unchanged: repeated rows share all pages, and the pages of rows left out
        become free.
        """
        filled = self.replace(tables=self.filled_tables(), sources=jnp.full_like(self.sources, -1))
        return super(PagedCache, filled).select(rows)

    def insert(self, slots: Any, source: Self) -> Self:
        """As `KVCache.insert`, on the host only: pages are allocated there.

        Rows of a source with the same pools, as after `select`, continue to share their pages. Otherwise the pages that
        the source's rows name are copied into free pages of these pools.

        Raises:
            CacheError: as `KVCache.insert`, or a cache is traced.
            CapacityError: there are too few free pages.
        """
        if not is_concrete(self, source, slots):
            raise CacheError("insert: expected paged caches outside jit, got traced ones")
        return insert_rows(self, slots, source)

    def join(self, others: Sequence[Self]) -> Self:
        """As `KVCache.join`. Host only.

        Caches with a common pool, as after `split`, continue to share it. Otherwise the pages that rows name are copied
        into a new pool with as many free pages as before, but no more than all rows could ever use.

        Raises:
            CacheError: the caches differ in page size, capacity, codec or model, or are traced.
        """
        if not is_concrete(self, others):
            raise CacheError("concat: expected paged caches outside jit, got traced ones")
        return join_rows((self, *others))

    def _check_alike(self, what: str, other: KVCache) -> None:
        super()._check_alike(what, other)
        assert isinstance(other, PagedCache)  # as the class is the same
        if other.page_size != self.page_size:
            raise CacheError(f"{what}: expected page_size={self.page_size}, got page_size={other.page_size}")

    def allocator(self, lengths: Any = None, pinned: Any = ()) -> PageAllocator:
        """An allocator for the current tables. Host only."""
        return PageAllocator(
            tables=np.asarray(self.tables),
            sources=np.asarray(self.sources).max(axis=0),
            lengths=np.asarray(self.lengths if lengths is None else lengths),
            pinned=np.asarray(pinned, np.int64).reshape(-1),
            page_size=self.page_size,
            num_pages=self.num_pages,
            capacity=self.limit,
            window=self.window,
        )

    def _last_pages(self) -> jax.Array:
        """int32 [B], the page of each row's next token, or any page if there is none."""
        column = jnp.minimum(self.lengths // self.page_size, self.tables.shape[1] - 1)
        return jnp.maximum(jnp.take_along_axis(self.tables, column[:, None], axis=1)[:, 0], 0)

    def filled_tables(self) -> jax.Array:
        """The tables without reserved pages and without pending copies."""
        tables = self._before_copies(jnp.max(self.sources, axis=0))
        return _without_reserve(tables, self.lengths, self.page_size)

    def _before_copies(self, sources: jax.Array) -> jax.Array:
        """The tables with the shared page, sources int32 [B], in place of copies that are still pending."""
        columns = jnp.arange(self.tables.shape[1], dtype=jnp.int32)[None]
        last = (columns == (self.lengths // self.page_size)[:, None]) & (sources >= 0)[:, None]
        return jnp.where(last, sources[:, None], self.tables)


def _without_reserve(tables: jax.Array, lengths: jax.Array, page_size: int) -> jax.Array:
    """Tables int32 [B, N] without the pages after the rows' ends."""
    columns = jnp.arange(tables.shape[1], dtype=jnp.int32)[None]
    return jnp.where(columns < blocks(lengths, page_size)[:, None], tables, -1)
