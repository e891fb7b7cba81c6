"""What an engine moves between the device's pool and the second one, stage by stage of a step.

Pages are allocated for the whole step first. Then the copies are dispatched: of the pages that were evicted, before
anything overwrites them, and to those that come back, before anything reads them. The evicted pages are stored at the
step's end, when the device has computed their copies and works on the step.
"""

from collections.abc import Sequence

import jax
import numpy as np

from llorch_jax.engine.copies import Contents
from llorch_jax.engine.device import Device
from llorch_jax.engine.host_pages import HostPages
from llorch_jax.engine.pages import PagePool


class Offload:
    """The second pool, and the pages on the way to it and back.

    Attributes:
        store: the second pool. Pages come and go only at the end of a step, so that plans hold.
    """

    def __init__(self, store: HostPages) -> None:
        self.store = store
        self._returning: list[tuple[int, bytes]] = []
        self._leaving: list[tuple[list[tuple[bytes, bytes]], Contents]] = []

    def allocate(self, pages: PagePool, absent: Sequence[tuple[int, bytes, bytes]]) -> dict[int, int]:
        """Allocates pages for what comes back from the second pool, once all new requests hold what is on the device.

        Args:
            pages: the device's pool.
            absent: number within a request, digest and tokens of its pages that are in the second pool only.

        Returns:
            The page for each number. A page that another request has brought back in the same step is shared.
        """
        found = {}
        for number, digest, content in absent:
            page = pages.find(digest, content)
            if page is None:
                (page,) = pages.allocate(1)
                pages.index(page, digest, content)
                self._returning.append((page, digest))
            else:
                pages.hold([page])
            found[number] = page
        return found

    def dispatch(self, pages: PagePool, device: Device) -> None:
        """Dispatches the copies of a step, after all its pages have been allocated."""
        evicted = [entry for entry in pages.take_evicted() if self.store.wants(entry[1])]
        if evicted:
            for part, contents in device.take_pages([page for page, _, _ in evicted]):
                self._leaving.append(([(digest, content) for _, digest, content in evicted[part]], contents))
        returning, self._returning = self._returning, []
        if returning:
            rows = self.store.restore([digest for _, digest in returning])
            device.put_pages([page for page, _ in returning], self.store.arrays, rows)

    def finish(self) -> None:
        """Stores the evicted pages, waiting for the device where necessary.

        Raises:
            Exception: whatever made the device fail.
        """
        leaving, self._leaving = self._leaving, []
        for entries, contents in leaving:
            self.store.add(entries, jax.tree.map(np.asarray, contents))

    def forget(self) -> None:
        """Gives up what is on the way, as the device's pool has been lost."""
        self._returning.clear()
        self._leaving.clear()
