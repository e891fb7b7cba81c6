"""PagedView: the vectors that queries may attend to, in the pages of a pool."""

import jax
from flax import struct

from llorch_jax.cache.codecs import Codec, Stored
from llorch_jax.cache.paged.arrays import gather_pages
from llorch_jax.cache.views import Exact, StoredView


@struct.dataclass
class PagedView(StoredView):
    """Stored vectors in pages; slot s of a row is slot s % page_size of page tables[row, s // page_size].

    Attributes:
        keys: stored pools with the leading axes [P, K, page_size].
        values: stored pools with the leading axes [P, K, page_size].
        tables: int32 [B, N]. A block without a page has any page: its slots lie after the row's end and are masked by
            causality.
        positions: int32 [1, N * page_size].
    """

    keys: Stored
    values: Stored
    tables: jax.Array
    positions: jax.Array
    exact: tuple[Exact, ...] = ()
    codec: Codec = struct.field(pytree_node=False, kw_only=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    sinks: int = struct.field(pytree_node=False, default=0)

    def slots(self) -> tuple[Stored, Stored]:
        def gathered(stored: Stored) -> Stored:
            return jax.tree.map(lambda pool: gather_pages(pool, self.tables), stored)

        return gathered(self.keys), gathered(self.values)

    def block_tables(self) -> jax.Array:
        return self.tables
