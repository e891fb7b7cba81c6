"""The host's bookkeeping for the pages of one pool: who holds them, and which tokens they keep for later requests.

Full pages are indexed by a hash of their tokens and of all tokens before them, as in vLLM's automatic prefix caching
(after Kwon et al. 2023, section 4.4). An indexed page that no request holds is idle: it keeps its contents for a later
request with the same beginning until it is needed for something else; the least recently used is reused first. Pages
are also shared with requests that are still running, as full pages are never written again.
"""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from llorch_jax.errors import CapacityError


@dataclasses.dataclass(frozen=True)
class PageCounts:
    """How the pages of a pool are used.

    Attributes:
        total: pages in the pool.
        held: pages that running requests hold.
        shared: pages that several requests hold.
        idle: pages that only the prefix cache holds.
        free: pages that hold nothing.
        indexed: pages in the prefix cache, held or idle.
        evicted: pages that have left the prefix cache so far.
    """

    total: int
    held: int
    shared: int
    idle: int
    free: int
    indexed: int
    evicted: int


class PagePool:
    """Pages 0 .. num_pages - 1, each of which is free, idle, or held by one or more requests."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self._holders = np.zeros(num_pages, np.int64)
        self._free = list(range(num_pages - 1, -1, -1))  # the last one is the next to be allocated
        self._idle: OrderedDict[int, None] = OrderedDict()  # the first one is the next to be reused
        self._pages: dict[bytes, int] = {}  # by the digest of all tokens up to the page's end
        self._entries: dict[int, tuple[bytes, bytes]] = {}  # digest and tokens of a page
        self._evicted = 0
        self._left: list[tuple[int, bytes, bytes]] = []

    @property
    def available(self) -> int:
        """Number of pages that can be allocated."""
        return len(self._free) + len(self._idle)

    @property
    def free(self) -> tuple[int, ...]:
        """The pages that hold nothing."""
        return tuple(self._free)

    def knows(self, digest: bytes) -> bool:
        """Whether a page with this digest is indexed."""
        return digest in self._pages

    def counts(self) -> PageCounts:
        """How the pages are used."""
        return PageCounts(
            total=len(self._holders),
            held=int(np.sum(self._holders > 0)),
            shared=int(np.sum(self._holders > 1)),
            idle=len(self._idle),
            free=len(self._free),
            indexed=len(self._entries),
            evicted=self._evicted,
        )

    def holders(self) -> list[int]:
        """The number of requests that hold each page; -1 for idle pages."""
        counts = self._holders.copy()
        counts[list(self._idle)] = -1
        return counts.tolist()

    def idle_among(self, pages: Iterable[int]) -> int:
        """How many of these pages are idle."""
        return sum(page in self._idle for page in pages)

    def match(
        self, tokens: np.ndarray, salt: bytes = b"", elsewhere: Callable[[bytes, bytes], bool] | None = None
    ) -> list[int]:
        """The indexed pages that contain the beginning of tokens int32 [T]; `hold` must be called to keep them.

        At least the last token remains to be computed, as its logits are needed.

        Args:
            tokens: the text.
            salt: see `Request`.
            elsewhere: whether another pool has the page with a digest and tokens; such pages are given as -1.
        """
        pages = []
        for digest, content in digests(tokens[: len(tokens) - 1], self.page_size, salt):
            page = self.find(digest, content)
            if page is None:
                if elsewhere is None or not elsewhere(digest, content):
                    break
                page = -1
            pages.append(page)
        return pages

    def find(self, digest: bytes, content: bytes) -> int | None:
        """The indexed page with this digest and these tokens, if there is one."""
        page = self._pages.get(digest)
        return page if page is not None and self._entries[page][1] == content else None

    def hold(self, pages: Iterable[int]) -> None:
        """Records that one more request holds these indexed or held pages."""
        for page in pages:
            assert self._holders[page] > 0 or page in self._idle, page
            self._idle.pop(page, None)
            self._holders[page] += 1

    def allocate(self, count: int) -> list[int]:
        """Allocates pages without contents, held by one request.

        Raises:
            CapacityError: fewer pages are available.
        """
        if count > self.available:
            raise CapacityError(f"engine: expected {count} free pages, got {self.available}")
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def take_evicted(self) -> list[tuple[int, bytes, bytes]]:
        """Page, digest and tokens of the pages that `allocate` has evicted since the last call.

        Their contents are intact until the pages are written.
        """
        left, self._left = self._left, []
        return left

    def release(self, pages: Sequence[int]) -> None:
        """Records that one request fewer holds these pages, given in the order of their tokens."""
        for page in reversed(pages):  # later pages are useless without the earlier ones, so they are reused first
            assert self._holders[page] > 0, page
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._entries:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def index(self, page: int, digest: bytes, content: bytes) -> None:
        """Indexes a full page that is held by its contents. Of two pages with the same contents the first one stays."""
        assert self._holders[page] > 0, page
        if digest not in self._pages and page not in self._entries:
            self._pages[digest] = page
            self._entries[page] = digest, content

    def owned(self, pages: Iterable[int]) -> int:
        """How many of these pages only one request holds."""
        return int(sum(self._holders[page] == 1 for page in pages))

    def forget(self) -> None:
        """Empties the prefix cache."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._pages.clear()
        self._entries.clear()

    def entries(self) -> list[tuple[int, bytes, bytes]]:
        """Page, digest and tokens of every indexed page: idle ones first, the least recently used at the front."""
        order = [*self._idle, *(page for page in self._entries if page not in self._idle)]
        return [(page, *self._entries[page]) for page in order]

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the bookkeeping agrees with the pages that requests hold. For tests."""
        counts = np.zeros_like(self._holders)
        for pages in held:
            np.add.at(counts, list(pages), 1)
        assert np.array_equal(counts, self._holders), (counts, self._holders)
        kinds = [*self._free, *self._idle, *np.flatnonzero(self._holders).tolist()]
        assert sorted(kinds) == list(range(len(self._holders)))
        assert {self._pages[digest] for digest, _ in self._entries.values()} == self._entries.keys()
        assert not self._entries.keys() & set(self._free)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        digest, content = self._entries.pop(page)
        del self._pages[digest]
        self._left.append((page, digest, content))
        self._evicted += 1
        return page


class Chain:
    """The digests of the full pages of a growing text."""

    def __init__(self, page_size: int, salt: bytes = b"") -> None:
        self.page_size = page_size
        self._digest = _root(page_size, salt)
        self.pages = 0

    def push(self, tokens: Sequence[int]) -> tuple[bytes, bytes]:
        """Digest and contents of the next page, given its tokens."""
        assert len(tokens) == self.page_size
        content = np.asarray(tokens, np.int32).tobytes()
        self._digest = _next(self._digest, content)
        self.pages += 1
        return self._digest, content


def digests(tokens: np.ndarray, page_size: int, salt: bytes = b"") -> Iterable[tuple[bytes, bytes]]:
    """Digest and contents of each full page of tokens int32 [T]."""
    chain = Chain(page_size, salt)
    for start in range(0, len(tokens) - page_size + 1, page_size):
        yield chain.push(tokens[start : start + page_size])  # type: ignore[arg-type]


def _root(page_size: int, salt: bytes) -> bytes:
    return hashlib.blake2b(salt, digest_size=16, key=f"pages of {page_size}".encode()).digest()


def _next(digest: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(digest + content, digest_size=16).digest()
