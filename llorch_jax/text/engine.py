"""An engine for many users: requests come and go at any time, and share one model, one cache and every step."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import numpy as np

from llorch_jax.cache.paged.cache import PAGE_SIZE
from llorch_jax.checks import check_context
from llorch_jax.decoding.scoring import scores_by_chunks
from llorch_jax.engine.core import Core
from llorch_jax.engine.device import Plot
from llorch_jax.engine.scheduler import Limits
from llorch_jax.engine.sequences import Request
from llorch_jax.engine.slots import TOP_LOGPROBS
from llorch_jax.engine.worker import Worker
from llorch_jax.errors import EngineError, OptionError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import Sampling
from llorch_jax.text.collecting import Growing
from llorch_jax.text.constrained.decoding import Rows
from llorch_jax.text.constrained.matching import can_constrain
from llorch_jax.text.ending import Ending
from llorch_jax.text.engine_stats import EngineStats
from llorch_jax.text.handles import Handle
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.prompts import encode_prompts, row_key
from llorch_jax.text.results import PromptLogprobs
from llorch_jax.text.vocabulary import known_ids, tokenizer_of
from llorch_jax.tracing import is_whole, whole

Value = TypeVar("Value")
CHUNK = 64
IDLE_CHUNK = 256
_MOST_SECONDS = 1e9  # a deadline beyond this is probably a mistake, and one beyond float64 would be none


class Engine:
    """Continuous batching over one paged cache with an automatic prefix cache; a context manager.

    The model runs in a thread of the engine's own. All methods may be called from any thread, and handles may be read
    from threads and event loops. A request's tokens are those of `generate` with the same options, whatever runs beside
    it. See docs/engine.md.
    """

    def __init__(
        self,
        model: Model,
        slots: int = 8,
        num_pages: int | None = None,
        *,
        page_size: int = PAGE_SIZE,
        codec: str | None = None,
        chunk: int = CHUNK,
        idle_chunk: int = IDLE_CHUNK,
        max_waiting: int = 1024,
        offload_bytes: int = 0,
    ) -> None:
        """Allocates the cache and starts the engine's thread.

        Args:
            model: from `load`; it must have a tokenizer.
            slots: maximum number of requests that run at once; more of them wait.
            num_pages: pages of the cache, for all requests together; by default enough for a full context in every
                slot.
            page_size: tokens per page.
            codec: how keys and values are stored: float32 (the default), bfloat16, float16, int8 or int4.
            chunk: maximum number of prompt tokens that a step computes while other requests are generating.
            idle_chunk: the same while none is.
            max_waiting: number of waiting requests beyond which no more are taken.
            offload_bytes: size of a second pool, in bytes of main memory: cached prefixes that have to leave the cache
                are kept there and copied back instead of computed again. 0 for none.

        Raises:
            EngineError: a size is invalid, or offload_bytes is less than a page or more than there is memory.
            CacheError: the codec is unknown.
            ModelError: the model has no tokenizer.
        """
        config = model.config
        tokenizer_of(model)
        page_size = min(whole("page_size", page_size, EngineError), config.n_positions)
        blocks = -(-config.n_positions // page_size)
        slots = whole("slots", slots, EngineError, most=4096)
        num_pages = slots * blocks if num_pages is None else whole("num_pages", num_pages, EngineError, most=2**31 - 1)
        limits = Limits(
            slots=slots,
            page_size=page_size,
            chunk=whole("chunk", chunk, EngineError),
            idle_chunk=whole("idle_chunk", idle_chunk, EngineError),
        )
        offload_bytes = whole("offload_bytes", offload_bytes, EngineError, least=0)
        plot = Plot(limits, num_pages, codec, offload_bytes)
        known = known_ids(tokenizer_of(model), config.vocab_size)
        max_waiting = whole("max_waiting", max_waiting, EngineError)
        self.model = model
        self._chunk = limits.chunk
        self._scoring = threading.Lock()  # so that no more than one chunk comes between two steps
        self._worker = Worker(lambda: Core(model.params, config, plot, known), max_waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.close(drain=kind is None)

    def submit(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str = "",
        sample: int = 0,
        **options: Any,
    ) -> Handle:
        """Queues a request, and returns at once.

        Args:
            prompt: a text, or token ids.
            max_new_tokens: maximum number of new tokens.
            priority: requests of higher priority get slots and pages first.
            deadline: seconds from now after which the request is given up if it has not ended.
            cache_salt: the request shares cached prefixes only with those of the same salt.
            sample: number of the sample, from 0: with a seed, `sample=i` gives the i-th text of `generate_n`.
            options: temperature, seed, stop and others of `GenerationOptions` by name; docs/options.md says which.

        Raises:
            OptionError: an option is unknown, invalid, or not for the engine.
            SamplerError: a sampling setting is invalid.
            ConstraintError: a constraint is invalid, or llguidance (the extra `constrained`) is missing.
            TokenError: the prompt is empty, or has characters or ids that are not in the vocabulary.
            CapacityError: prompt and new tokens do not fit the context, or the engine's pages.
            EngineError: too many requests wait, or the engine is closed.
        """
        checked = GenerationOptions.create(max_new_tokens=max_new_tokens, **options)
        return self.submit_checked(
            prompt, checked, priority=priority, deadline=deadline, cache_salt=cache_salt, sample=sample
        )

    def submit_checked(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str = "",
        sample: int = 0,
        notify: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """`submit` for checked options; `notify` is called in the engine's thread after every change of the handle."""
        model = self.model
        settings = _settings(model, options)
        if not is_whole(priority):
            raise OptionError(f"priority: expected a whole number, got {priority!r:.80}")
        number = isinstance(deadline, int | float) and not isinstance(deadline, bool)
        if deadline is not None and not (number and 0 < deadline < _MOST_SECONDS):
            raise OptionError(f"deadline: expected seconds above 0 and below 1e9, got {deadline!r:.80}")
        if not isinstance(cache_salt, str):
            raise OptionError(f"cache_salt: expected a text, got {cache_salt!r:.80}")
        ids = self._encoded(prompt)
        limit, seed = options.max_new_tokens, options.seed
        assert isinstance(limit, int)  # one per prompt has been refused
        assert isinstance(seed, int)
        ending = Ending.of(model, options, limit)
        handle = Handle(Growing(tokenizer_of(model), ending, ids), notify)
        sample = whole("sample", sample, OptionError, least=0, most=2**31 - 1)
        request = Request(
            tokens=np.asarray(ids, np.int32),
            max_new_tokens=limit,
            settings=settings,
            key=np.asarray(jax.random.key_data(row_key(seed, sample))),
            eos_ids=ending.ids,
            guide=None if options.constraint is None else Rows(model, options.constraint, 1, ending.ids),
            top_logprobs=options.top_logprobs,
            priority=int(priority),
            deadline=None if deadline is None else time.monotonic() + deadline,
            salt=cache_salt.encode("utf-8", "surrogatepass"),
            on_token=handle.take,
            on_error=handle.fail,
        )
        handle.attach(self._worker, self._worker.submit(request))
        return handle

    def prompt_logprobs(
        self, prompt: str | Sequence[int], top_logprobs: int = 0, *, wanted: Callable[[], bool] = lambda: True
    ) -> PromptLogprobs:
        """Log-probabilities of a prompt's tokens, computed in chunks between the steps of other requests.

        Args:
            prompt: a text, or token ids.
            top_logprobs: number of alternatives for each token.
            wanted: called before each chunk; once it returns False, the rest is not computed.

        Raises:
            OptionError: top_logprobs is out of range, or an id not in the vocabulary.
            TokenError: the prompt is empty, or has characters that are not in the vocabulary.
            CapacityError: the prompt has more tokens than the context, and one that needs no position.
            NonFiniteError: the model's logits are NaN or infinite.
            EngineError: the engine is closed.
        """
        model = self.model
        most = min(TOP_LOGPROBS, model.config.vocab_size)
        top = whole("top_logprobs", top_logprobs, OptionError, least=0, most=most)
        ids = self._encoded(prompt)
        check_context(model.config, np.int32(len(ids)), -1)
        found = PromptLogprobs(ids, [None], [None])
        chunks = scores_by_chunks(model.params, model.config, ids, most if top else 0, self._chunk)
        while wanted():
            with self._scoring:
                scores = self.inspect(lambda _: next(chunks, None))
            if scores is None:
                break
            found.logprobs.extend(scores.logprobs.tolist())
            pairs = zip(scores.top_ids[:, :top].tolist(), scores.top_logprobs[:, :top].tolist(), strict=True)
            found.top_logprobs.extend(list(zip(*pair, strict=True)) for pair in pairs)
        return found

    def _encoded(self, prompt: str | Sequence[int]) -> list[int]:
        given = prompt if isinstance(prompt, str) else check_ids(prompt, self.model.config.vocab_size)
        (ids,) = encode_prompts(self.model, [given])
        return list(ids)

    def warm_up(self) -> None:
        """Compiles all programs, which otherwise happens when each is first needed.

        Those for constraints only if llguidance (the extra `constrained`) is installed.

        Raises:
            EngineError: the engine is closed.
        """
        guided = can_constrain()
        self.inspect(lambda core: core.warm_up(guided=guided))

    def stats(self) -> EngineStats:
        """What the engine is doing, between two steps.

        Raises:
            EngineError: the engine is closed.
        """
        return self.inspect(EngineStats.of)

    def inspect(self, function: Callable[[Core], Value]) -> Value:
        """What a function returns that is called in the engine's thread between two steps, as for a monitor.

        Raises:
            EngineError: the engine is closed.
        """
        return self._worker.call(function)

    def save_prefixes(self, path: str | os.PathLike[str]) -> int:
        """Writes the prefix cache to a file, replacing it only by a complete one; returns the number of pages.

        It runs between two steps, which wait for it.

        Raises:
            EngineError: the file cannot be written, or the engine is closed.
        """
        return self.inspect(lambda core: core.save_prefixes(Path(path)))

    def load_prefixes(self, path: str | os.PathLike[str]) -> int:
        """Adds the pages in a file of `save_prefixes` to the prefix cache; returns their number.

        Where fewer are free, the longest unused stay out.

        Raises:
            EngineError: the file is missing, damaged, of another model, or of an engine with pages of another size or
                codec; or the engine is closed.
        """
        return self.inspect(lambda core: core.load_prefixes(Path(path)))

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and ends the engine's thread.

        Args:
            drain: whether the requests under way are answered first; otherwise they fail with an EngineError.
            timeout: seconds after which they fail even so; None for no limit.
        """
        self._worker.close(drain=drain, timeout=timeout)


def check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids as a list.

    Raises:
        OptionError: they are not ids of the vocabulary.
    """
    known = ids.tolist() if isinstance(ids, np.ndarray | jax.Array) else ids
    if not isinstance(known, Sequence) or isinstance(known, bytes | bytearray):
        raise OptionError(f"prompt: expected a text or a list of token ids, got a {type(ids).__name__}")
    for id in known:
        if not is_whole(id) or not 0 <= id < vocab_size:
            raise OptionError(f"prompt: expected ids in 0 .. {vocab_size - 1}, got {id!r:.80}")
    return [int(id) for id in known]


def _settings(model: Model, options: GenerationOptions) -> dict[str, Any]:
    """The settings of a slot's sampler, after all checks of the options."""
    options.check_method("the engine")
    if options.constraint is not None:
        options.check_method("constrained generation")
    options.check_model(model)
    if options.top_logprobs > TOP_LOGPROBS:
        raise OptionError(f"top_logprobs: expected 0 .. {TOP_LOGPROBS} with the engine, got {options.top_logprobs}")
    settings = {"temperature": options.temperature, **options.sampling_for(model)}
    Sampling.superset([settings]).check_ids(model.config.vocab_size)
    return settings
