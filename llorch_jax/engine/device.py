"""An engine's state on the device, and the calls of its programs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from llorch_jax.buckets import SMALLEST, bucket, power_of_two
from llorch_jax.cache.paged import PagedCache
from llorch_jax.cache.placement import new_cache, placed
from llorch_jax.config import GPT2Config
from llorch_jax.engine import copies
from llorch_jax.engine import slots as programs
from llorch_jax.engine.scheduler import Limits
from llorch_jax.engine.sequences import Sequence
from llorch_jax.engine.settings import SlotSettings
from llorch_jax.errors import MeshError
from llorch_jax.kernels.library import available
from llorch_jax.params import Params

_FEWEST_PAGES = 8  # columns of the narrowest table for which a program is compiled


@dataclasses.dataclass(frozen=True)
class Plot:
    """The fixed sizes of an engine.

    Attributes:
        limits: the limits of a step.
        num_pages: number of pages in the pool.
        codec: how keys and values are stored.
        offload_bytes: size of the second pool in bytes; 0 for none.
    """

    limits: Limits
    num_pages: int
    codec: str | None = None
    offload_bytes: int = 0


class Device:
    """Pools, slots and settings of one model. The results of its methods have been dispatched, but not yet computed."""

    def __init__(self, params: Params, config: GPT2Config, plot: Plot, known: np.ndarray | None) -> None:
        """Allocates the pool.

        Args:
            params: the model's parameters.
            config: the model's hyperparameters.
            plot: the engine's fixed sizes.
            known: bits of the ids that may be drawn, see `Settings`; None for all.
        """
        limits = plot.limits
        self._mesh = params.mesh
        if self._mesh is not None and self._mesh.is_multi_process:  # whose schedules would differ
            raise MeshError("engine: expected a mesh of one process, got one of several; run an engine in each")
        cache = new_cache(
            self._mesh,
            PagedCache.init,
            config,
            batch_size=limits.slots,
            page_size=limits.page_size,
            num_pages=plot.num_pages,
            codec=plot.codec,
            residual=0,
        )
        self._params = params
        self._config = config
        self._limits = limits
        self._offloads = plot.offload_bytes > 0
        self._slots = placed(self._mesh, programs.Slots.empty(cache, bucket(config.n_positions + 1)))
        self._settings = SlotSettings(limits.slots, None if known is None else jax.device_put(known))
        self._columns = -(-config.n_positions // limits.page_size)

    def prefill(self, sequence: Sequence, count: int) -> jax.Array:
        """Logits [1, V] after the next `count` tokens of a request, if they are the last before it decodes."""
        start = sequence.computed
        tokens = np.zeros((1, self._chunk_size(count)), np.int32)
        tokens[0, :count] = sequence.tokens[start : start + count]
        return self._prefill(tokens, start, count, self._tables([sequence], 1), final=start + count >= sequence.target)

    def enter(self, sequence: Sequence, logits: jax.Array) -> Any:
        """The first token of a request, given the logits [1, V] after its prompt: token, logprob, alternatives."""
        request = sequence.request
        self._settings.set(sequence.place, request)
        history = np.zeros(self._slots.history.tokens.shape[1], np.int32)
        history[: sequence.length] = sequence.tokens[: sequence.length]
        entrant = programs.Entrant(
            slot=np.int32(sequence.place),
            tokens=history,
            length=np.int32(sequence.length),
            prompt=np.int32(len(request.tokens)),
            remaining=np.int32(request.max_new_tokens - sequence.new),
        )
        wanted = _wanted([sequence])
        return _results(self._enter(logits, entrant, self._allowed([sequence], 1), wanted), wanted)

    def decode(self, sequences: list[Sequence]) -> Any:
        """The next token of some requests: token, logprob, alternatives, each with a leading axis."""
        rows = self._rows(sequences)
        wanted = _wanted(sequences)
        return _results(self._decode(rows, self._tables(sequences, len(rows)), wanted), wanted)

    def feed(self, sequences: list[Sequence]) -> jax.Array:
        """Logits [A, V] after the newest token of some requests; `draw` then gives what `decode` would."""
        rows = self._rows(sequences)
        return self._feed(rows, self._tables(sequences, len(rows)))

    def draw(self, sequences: list[Sequence], logits: jax.Array) -> Any:
        """The next token of the requests that the logits of `feed` are for, as their guides allow."""
        rows = self._rows(sequences)
        wanted = _wanted(sequences)
        return _results(self._draw(logits, rows, self._allowed(sequences, len(rows)), wanted), wanted)

    def take_pages(self, pages: list[int]) -> Iterator[tuple[slice, copies.Contents]]:
        """Copies of pages, made before any step that is dispatched later: which of the pages, and their contents."""
        for part, numbers in copies.batches(pages):
            yield part, copies.take(self.cache, numbers)

    def put_pages(self, pages: list[int], source: copies.Contents, rows: list[int]) -> None:
        """Replaces the contents of pages by rows of the source, NumPy arrays [N, ...]."""
        for part, numbers in copies.batches(pages):

            def taken(array: np.ndarray, part: slice = part, size: int = numbers.size) -> np.ndarray:
                out = np.empty((size, *array.shape[1:]), array.dtype)
                np.take(array, rows[part], axis=0, out=out[: part.stop - part.start], mode="clip")
                return out

            self._put(numbers, jax.tree.map(taken, source), part.stop - part.start)

    def _put(self, numbers: np.ndarray, contents: copies.Contents, count: int) -> None:
        if self._mesh is not None:  # each device gets its heads only
            shardings = jax.tree.map(lambda pool: pool.sharding, copies.pools_of(self.cache))
            contents = jax.device_put(contents, shardings)
        self.cache = copies.put(self.cache, numbers, contents, np.int32(count), mesh=self._mesh)

    @property
    def cache(self) -> PagedCache:
        """The pools."""
        return self._slots.cache

    @cache.setter
    def cache(self, cache: PagedCache) -> None:
        self._slots = self._slots.replace(cache=cache)  # type: ignore[attr-defined]

    def warm_up(self, *, guided: bool = False) -> None:
        """Compiles every program by running it on no tokens; call it only while no request runs.

        Args:
            guided: whether requests may have guides, which take programs of their own.
        """
        most = min(self._limits.idle_chunk, self._config.n_positions)
        for size in sorted({self._chunk_size(count) for count in range(1, most + 1)}):
            blocks = range(-(-size // self._limits.page_size), self._columns + 1)
            for columns in sorted({self._width(count) for count in blocks}):
                logits = self._prefill(np.zeros((1, size), np.int32), 0, 0, np.full((1, columns), -1, np.int32), True)
        history = np.zeros(self._slots.history.tokens.shape[1], np.int32)
        nobody, one = np.int32(self._limits.slots), np.int32(1)
        entrant = programs.Entrant(nobody, history, one, one, np.int32(0))
        self._enter(logits, entrant, self._allowed([], 1), wanted=False)
        for size in sorted({min(power_of_two(n), self._limits.slots) for n in range(1, self._limits.slots + 1)}):
            rows = np.full(size, nobody)
            for columns in sorted({self._width(count) for count in range(1, self._columns + 1)}):
                tables = np.full((size, columns), -1, np.int32)
                self._decode(rows, tables, wanted=False)
                if guided:
                    logits = self._feed(rows, tables)
            if guided:
                self._draw(logits, rows, self._allowed([], size), wanted=False)
        if self._offloads:
            for size in sorted({power_of_two(n) for n in range(1, min(self.cache.num_pages, copies.MOST) + 1)}):
                ((_, contents),) = self.take_pages([0] * size)
                self._put(np.zeros(size, np.int32), jax.tree.map(np.asarray, contents), 0)
        jax.block_until_ready(self._slots)

    def _prefill(self, tokens: np.ndarray, start: int, count: int, table: np.ndarray, final: bool) -> jax.Array:
        place = np.array([start], np.int32), np.array([count], np.int32)
        chunk = self._params, self._config, self._slots, tokens, *place, table, np.bool_(final)
        logits, self._slots = programs.prefill(*chunk)
        return logits

    def _enter(
        self, logits: jax.Array, entrant: programs.Entrant, allowed: programs.Allowed, wanted: bool
    ) -> programs.Chosen:
        choice = self._settings.on_device(), logits, entrant, allowed, np.bool_(wanted)
        chosen, self._slots = programs.enter(self._slots, *choice, mesh=self._mesh)
        return chosen

    def _feed(self, rows: np.ndarray, tables: np.ndarray) -> jax.Array:
        logits, self._slots = programs.feed(self._params, self._config, self._slots, rows, tables)
        return logits

    def _draw(self, logits: jax.Array, rows: np.ndarray, allowed: programs.Allowed, wanted: bool) -> programs.Chosen:
        choice = self._settings.on_device(), logits, rows, allowed, np.bool_(wanted)
        chosen, self._slots = programs.draw(self._slots, *choice, mesh=self._mesh)
        return chosen

    def _decode(self, rows: np.ndarray, tables: np.ndarray, wanted: bool) -> programs.Chosen:
        step = self._settings.on_device(), rows, tables, np.bool_(wanted)
        chosen, self._slots = programs.decode(self._params, self._config, self._slots, *step)
        return chosen

    def _chunk_size(self, count: int) -> int:
        """The number of columns used to compute `count` tokens; a power of two, so that few programs are compiled."""
        return min(max(power_of_two(count), SMALLEST), self._config.n_positions)

    def _rows(self, sequences: list[Sequence]) -> np.ndarray:
        """int32 [A], the slots of some requests, padded to a power of two, with the number of slots."""
        rows = np.full(min(power_of_two(len(sequences)), self._limits.slots), self._limits.slots, np.int32)
        rows[: len(sequences)] = [sequence.place for sequence in sequences]
        return rows

    def _allowed(self, sequences: list[Sequence], rows: int) -> programs.Allowed:
        """What the guides of some requests allow next, and everything in the other rows."""
        mask = np.full((rows, -(-self._config.vocab_size // 32)), -1, np.int32)
        insists = np.zeros(rows, bool)
        for row, sequence in enumerate(sequences):
            guide = sequence.request.guide
            if guide is not None:
                mask[row] = guide.mask[0]
                insists[row] = guide.insists[0]
        return programs.Allowed(mask, insists)

    def _tables(self, sequences: list[Sequence], rows: int) -> np.ndarray:
        """int32 [rows, N], the pages of some requests, padded with -1."""
        longest = max(len(sequence.pages) for sequence in sequences)
        tables = np.full((rows, self._width(longest)), -1, np.int32)
        for row, sequence in zip(tables, sequences, strict=False):
            row[: len(sequence.pages)] = sequence.pages
        return tables

    def _width(self, pages: int) -> int:
        """Number of columns of a table for rows of up to `pages` pages.

        The kernels skip pages without tokens. Where they are not used, pages are gathered: no more than twice as many
        as needed.
        """
        if available():
            return self._columns
        return min(self._columns, max(power_of_two(pages), _FEWEST_PAGES))


def _wanted(sequences: list[Sequence]) -> bool:
    """Whether some requests ask for alternatives."""
    return any(sequence.request.top_logprobs for sequence in sequences)


def _results(chosen: programs.Chosen, wanted: bool) -> Any:
    return chosen.token, chosen.logprob, chosen.top if wanted else None


def compile_count() -> int:
    """How many variants of the engine's programs have been compiled in this process."""
    compiled: list[Any] = [
        programs.prefill,
        programs.enter,
        programs.decode,
        programs.feed,
        programs.draw,
        copies.take,
        copies.put,
    ]
    return sum(program._cache_size() for program in compiled)
