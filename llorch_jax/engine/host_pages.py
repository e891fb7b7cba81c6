"""The second pool: pages that have left the device's pool, in the host's memory.

A page keeps the digest by which the prefix cache finds it (see `pages`), and its tokens, which are compared too. Its
keys and values are copied as they are stored, so that a page that is brought back has the same bits. Bringing it back
leaves it here: when it leaves the device's pool again, nothing has to be copied.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from llorch_jax.engine.copies import Contents
from llorch_jax.errors import EngineError


@dataclasses.dataclass(frozen=True)
class OffloadCounts:
    """How the second pool is used.

    Attributes:
        total: pages for which there is room; 0 without a second pool.
        pages: pages in it, of which the device's pool may have some too.
        bytes: bytes of these pages.
        saved: pages copied into it so far.
        restored: pages copied back to the device so far.
        dropped: pages that have had to make room for others so far.
    """

    total: int
    pages: int
    bytes: int
    saved: int
    restored: int
    dropped: int


class HostPages:
    """Pages in host memory, found by their digests; the least recently used makes room for a new one."""

    def __init__(self, arrays: Contents = (), page_bytes: int = 0, total: int = 0) -> None:
        """A pool for `total` pages of `page_bytes` in NumPy arrays [total, ...]; see `of`. By default for none."""
        self.arrays = arrays
        self._page_bytes = page_bytes
        self._total = total
        self._free = list(range(total - 1, -1, -1))
        self._places: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()  # place and tokens; the first one goes next
        self._saved = self._restored = self._dropped = 0

    @classmethod
    def of(cls, pools: Contents, num_bytes: int) -> "HostPages":
        """A pool for as many pages of the form of these arrays [P, ...] as fit into `num_bytes`.

        Memory is taken from the system only when it is first used.

        Raises:
            EngineError: not even one page fits, or there is no such amount of memory.
        """
        page_bytes = sum(pool.nbytes // pool.shape[0] for pool in jax.tree.leaves(pools))
        total = num_bytes // page_bytes
        if total == 0:
            raise EngineError(
                f"offload_bytes: expected 0, or at least a page of {page_bytes:,} bytes, got {num_bytes:,}"
            )
        try:
            arrays = jax.tree.map(lambda pool: np.empty((total, *pool.shape[1:]), pool.dtype), pools)
        except (MemoryError, ValueError):  # NumPy raises the second for more bytes than it can count
            raise EngineError(f"offload_bytes: expected as many bytes as there is memory, got {num_bytes:,}") from None
        return cls(arrays, page_bytes, total)

    @property
    def free(self) -> int:
        """Number of pages that can be added without dropping others."""
        return len(self._free)

    def counts(self) -> OffloadCounts:
        """How the pool is used."""
        pages = len(self._places)
        used = pages * self._page_bytes
        return OffloadCounts(self._total, pages, used, self._saved, self._restored, self._dropped)

    def has(self, digest: bytes, content: bytes) -> bool:
        """Whether the page with this digest and these tokens is here."""
        entry = self._places.get(digest)
        return entry is not None and entry[1] == content

    def wants(self, digest: bytes) -> bool:
        """Whether a page that leaves the device's pool should be copied; if it is here, it counts as just used."""
        if digest in self._places:
            self._places.move_to_end(digest)
            return False
        return self._total > 0

    def add(self, entries: Sequence[tuple[bytes, bytes]], contents: Contents) -> None:
        """Adds pages: digest and tokens of each, and NumPy arrays [N, ...] with N of at least their number."""
        pairs = list(zip(jax.tree.leaves(self.arrays), jax.tree.leaves(contents), strict=True))
        for row in range(max(len(entries) - self._total, 0), len(entries)):
            digest, content = entries[row]
            if not self.wants(digest):
                continue
            place = self._place()
            for array, new in pairs:
                array[place] = new[row]
            self._places[digest] = place, content
            self._saved += 1

    def restore(self, digests: Sequence[bytes]) -> list[int]:
        """The rows of `arrays` that hold these pages, in the order of their tokens; they count as just used."""
        for digest in reversed(digests):  # later pages are useless without the earlier ones
            self._places.move_to_end(digest)
        self._restored += len(digests)
        return [self._places[digest][0] for digest in digests]

    def entries(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Row of `arrays`, digest and tokens of every page, the least recently used first."""
        for digest, (place, content) in self._places.items():
            yield place, digest, content

    def check(self) -> None:
        """Raises AssertionError unless the bookkeeping is consistent. For tests."""
        used = [place for place, _ in self._places.values()]
        assert sorted([*used, *self._free]) == list(range(self._total))
        assert all(array.shape[0] == self._total for array in jax.tree.leaves(self.arrays))

    def _place(self) -> int:
        if self._free:
            return self._free.pop()
        _, (place, _) = self._places.popitem(last=False)
        self._dropped += 1
        return place
