"""A request inside the engine: what was asked for, and how far it has got."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from llorch_jax.decoding.guided import Guide
from llorch_jax.engine.pages import Chain
from llorch_jax.engine.scheduler import Rank, Running, Waiting


class Token(NamedTuple):
    """A new token of a request.

    Attributes:
        id: the token's id.
        logprob: natural log-probability under the model.
        top: most likely ids with their log-probabilities; None if not requested.
        last: whether the request ends with this token.
        ended: whether it does so because this id ends a text, or because its guide allows nothing more.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]] | None
    last: bool
    ended: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request to the engine; checked by `Core.check`.

    Attributes:
        tokens: int32 [T], the prompt.
        max_new_tokens: maximum number of new tokens.
        settings: settings of the sampler for one row, as `Sampling.create` takes them.
        key: uint32 [W], data of the random key.
        eos_ids: ids that end the text.
        guide: a guide for this one text, filled for the first token; None to allow every token.
        top_logprobs: number of most likely tokens to report at every step.
        priority: requests of higher priority come first.
        deadline: value of `time.monotonic()` after which the request is abandoned; None for no limit.
        salt: requests share cached prefixes only with those that have the same salt.
        on_token: called for every new token, in the engine's thread; returns whether to continue.
        on_error: called once instead if the request fails or is abandoned.
    """

    tokens: np.ndarray
    max_new_tokens: int
    settings: Mapping[str, Any]
    key: np.ndarray
    eos_ids: tuple[int, ...] = ()
    guide: Guide | None = None
    top_logprobs: int = 0
    priority: int = 0
    deadline: float | None = None
    salt: bytes = b""
    on_token: Callable[[Token], bool]
    on_error: Callable[[BaseException], None]


class Sequence:
    """A waiting or running request.

    Attributes:
        request: what was asked for.
        rank: its place in the order.
        tokens: prompt and new tokens so far, int32, with room for all.
        length: number of these tokens.
        computed: number of tokens that the cache holds, or will hold after what has been dispatched.
        target: number of tokens to compute before it decodes.
        pages: its pages in order; -1 for those that a window has freed.
        slot: its slot; None while it waits.
        dispatched: total number of new tokens whose computation has been dispatched.
        over: whether it has ended, failed or been cancelled.
        cached: number of prompt tokens that the prefix cache had when the request first got a slot; None before that.
        submitted: `time.perf_counter()` when it was submitted.
        started: the same at its first token; None before that.
        latest: the same at its newest token.
        preemptions: number of times it has been preempted.
    """

    def __init__(self, request: Request, rank: Rank, page_size: int) -> None:
        self.request = request
        self.rank = rank
        self.tokens = np.zeros(len(request.tokens) + request.max_new_tokens, np.int32)
        self.tokens[: len(request.tokens)] = request.tokens
        self.length = len(request.tokens)
        self.computed = 0
        self.target = self.length
        self.pages: list[int] = []
        self.slot: int | None = None
        self.dispatched = 0
        self.over = False
        self.cached: int | None = None
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.latest = self.submitted
        self.preemptions = 0
        self._chain = Chain(page_size, request.salt)

    @property
    def new(self) -> int:
        """Number of new tokens known so far."""
        return self.length - len(self.request.tokens)

    @property
    def place(self) -> int:
        """Its slot while it runs."""
        assert self.slot is not None
        return self.slot

    @property
    def decoding(self) -> bool:
        """Whether all its tokens are in the cache, or will be."""
        return self.computed >= self.target

    @property
    def held(self) -> list[int]:
        """The pages that it holds."""
        return [page for page in self.pages if page >= 0]

    def take(self, token: int, logprob: float, alternatives: Any, row: int) -> bool:
        """Adds a new token and passes it on to the request; returns whether another one is wanted.

        Args:
            token: its id.
            logprob: its log-probability.
            alternatives: those of a step, on the host; used if the request asks for some.
            row: the request's row in them.

        Raises:
            Exception: what the request's guide or its `on_token` raises.
        """
        request = self.request
        ended = self._push(token)
        last = ended or self.new == request.max_new_tokens
        top = None
        if request.top_logprobs:
            ids = alternatives.ids[row, : request.top_logprobs].tolist()
            top = list(zip(ids, alternatives.logprobs[row, : request.top_logprobs].tolist(), strict=True))
        goes_on = request.on_token(Token(token, logprob, top, last, ended))
        return goes_on and not last

    def _push(self, token: int) -> bool:
        """Adds a new token, and returns whether the text ends with it."""
        self.tokens[self.length] = token
        self.length += 1
        guide = self.request.guide
        if guide is None:
            return token in self.request.eos_ids
        guide.push(np.array([token], np.int32), np.ones(1, bool))
        if not guide.complete[0] and self.new < self.request.max_new_tokens:
            guide.fill()
        return bool(guide.complete[0])

    def waiting(self, cached: int, idle: int, absent: int) -> Waiting:
        """The scheduler's view of it while it waits."""
        return Waiting(self.rank, self.length, cached, idle, absent)

    def running(self, owned: int) -> Running:
        """The scheduler's view of it while it runs."""
        ended = self.over or self.dispatched >= self.request.max_new_tokens
        return Running(self.rank, self.computed, self.target, len(self.pages), owned, ended)

    def restart(self) -> None:
        """Returns to waiting, with all tokens known so far."""
        self.slot = None
        self.pages = []
        self.computed = 0
        self.target = self.length
        self.dispatched = self.new
        self._chain = Chain(self._chain.page_size, self.request.salt)

    def begin(self, pages: list[int], page_size: int) -> list[tuple[int, bytes, bytes]]:
        """Starts with pages of the prefix cache; returns number, digest and tokens of those given as -1."""
        self.pages = list(pages)
        self.computed = len(pages) * page_size
        if self.cached is None:  # later it finds its own pages
            self.cached = self.computed
        absent = []
        for number, page in enumerate(pages):
            content = self._chain.push(self.tokens[number * page_size : (number + 1) * page_size].tolist())
            if page < 0:
                absent.append((number, *content))
        return absent

    def filled(self, page_size: int) -> list[tuple[int, bytes, bytes]]:
        """Page, digest and contents of every page that has become full with known tokens since the last call."""
        known = min(self.computed, max(self.target, self.length - 1))  # the newest token is not in the cache
        out = []
        while (self._chain.pages + 1) * page_size <= known:
            number = self._chain.pages
            content = self._chain.push(self.tokens[number * page_size : (number + 1) * page_size].tolist())
            if self.pages[number] >= 0:
                out.append((self.pages[number], *content))
        return out


class Ranks:
    """Numbers requests in the order of their arrival."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def next(self, priority: int) -> Rank:
        """The rank of the next request."""
        return Rank(-priority, next(self._numbers))
