"""A conversation with a model: its text, the cache of it, and how turns are written. No terminal here.

The cache is kept from turn to turn: only text that it does not hold is prefilled.
"""

import dataclasses
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.archive import Kind, read_archive, write_archive
from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.files import CACHE_CLASSES, check_loaded, fingerprint
from llorch_jax.cache.layouts import fit_cache
from llorch_jax.decoding.request import prepare
from llorch_jax.decoding.streaming import Segment
from llorch_jax.errors import CacheError, CapacityError, ChatError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import History, make_sampler
from llorch_jax.text.results import tokenizer_of
from llorch_jax.text.stopping import StopMatcher


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are written. Models that were not trained on conversations know none; plain roles often do.

    Attributes:
        before: what stands before the user's words.
        after: what stands behind them, and leads to the reply.
        stops: texts before which a reply ends.
    """

    before: str = "\nUser: "
    after: str = "\nAssistant:"
    stops: tuple[str, ...] = ("\nUser:",)


RAW = Template("", "", ())  # the model goes on with the text


@struct.dataclass
class _Saved:
    """A conversation in a file: int32 tokens [N], how many there were before each turn [T], and the cache."""

    tokens: jax.Array
    turns: jax.Array
    cache: Any


def _check_loaded(saved: _Saved) -> None:
    """Raises ChatError unless the fields of a conversation that was read from a file fit each other."""
    tokens, turns = np.asarray(saved.tokens), np.asarray(saved.turns)
    for name, array in (("tokens", tokens), ("turns", turns)):
        if array.ndim != 1 or array.dtype != np.int32 or array.min(initial=0) < 0:
            raise ChatError(f"{name}: expected int32 [N] of 0 or greater, got {array.dtype} {list(array.shape)}")
    if turns.max(initial=0) > len(tokens) or (np.diff(turns) < 0).any():
        raise ChatError(f"turns: expected ascending numbers up to {len(tokens)}, got {turns!r:.80}")
    if not isinstance(saved.cache, KVCache):
        raise ChatError(f"cache: expected one, got {saved.cache!r:.80}")
    check_loaded(saved.cache)
    lengths = np.asarray(saved.cache.lengths)
    if lengths.shape != (1,) or lengths[0] > len(tokens):
        raise ChatError(f"cache: expected one row of no more than {len(tokens)} tokens, got lengths {lengths!r:.80}")


_KIND = Kind("conversation", _Saved, (_Saved, *CACHE_CLASSES), ChatError, _check_loaded)


class Chat:
    """A conversation in progress.

    Attributes:
        tokens: ids of the whole text.
        turns: how many tokens there were before each turn.
        stats: of the last turn: "prefilled" and "generated" tokens, "prefill_ms" until the first of these, and
            "ms_per_token" of the others.
    """

    def __init__(
        self, model: Model, template: Template = RAW, *, cache: str = "static", system: str = "", **settings: Any
    ) -> None:
        """An empty conversation, or one that begins with a text of yours, `system`.

        Args:
            model: from `load`.
            template: how turns are written; `RAW` for none.
            cache: layout, as for `generate`.
            settings: `temperature`, `seed` and others of the sampler.

        Raises:
            CacheError, SamplerError, ModelError: as `generate`.
        """
        self.model, self.template, self.layout = model, template, cache
        self._seed = settings.pop("seed", 0)
        self._sampler = make_sampler(**{"temperature": 0.0, **settings})
        self._tokenizer = tokenizer_of(model)
        self.tokens: list[int] = self._tokenizer.encode(system) if system else []
        self.turns: list[int] = []
        self.cache = self._empty()
        self.stats: dict[str, float] = {"prefilled": 0, "generated": 0, "prefill_ms": 0.0, "ms_per_token": 0.0}

    def _empty(self) -> KVCache:
        return fit_cache(self.model.config, self.layout, 1, self.model.config.n_positions)

    @property
    def text(self) -> str:
        """The whole text."""
        return self._tokenizer.decode(self.tokens)

    def reply(self, words: str, max_new_tokens: int = 128) -> Generator[str, None, None]:
        """Adds a turn and gives the reply in pieces, as `stream` does. What is taken of it becomes part of the text.

        Closing the iterator ends the reply where it is.

        Raises:
            ChatError: there is nothing to go on from.
            CapacityError: the turn does not fit the context. The conversation is as it was.
        """
        new = self._tokenizer.encode(self.template.before + words + self.template.after)
        before, context = len(self.tokens), self.model.config.n_positions
        room = context - before - len(new) + 1
        if not self.tokens and not new:
            raise ChatError("expected some text to go on from, got none")
        if room < 1:
            left = max(0, context - before)
            raise CapacityError(
                f"expected a turn of {left} tokens or fewer, which the context of {context} has left, got {len(new)}; "
                "take back a turn or begin anew"
            )
        return self._reply(new, min(max_new_tokens, room))

    def _reply(self, new: list[int], limit: int) -> Generator[str, None, None]:
        before, matcher, decoder = len(self.tokens), StopMatcher(self.template.stops), self._tokenizer.stream()
        self.turns.append(before)
        self.tokens += new
        given, shown = 0, ""
        start = first = time.perf_counter()
        try:
            segment = self._start(limit)
        except BaseException:  # the cache has been donated
            del self.tokens[before:], self.turns[-1]
            self.cache = self._empty()
            raise
        length = len(self.tokens)
        try:
            for step in segment.run():
                given += 1
                first = time.perf_counter() if given == 1 else first
                token = int(step.token[0])
                if step.finished[0]:
                    break
                self.tokens.append(token)
                piece = matcher.push(decoder.push(token))
                shown += piece
                yield piece
                if matcher.found is not None:
                    break
            else:
                piece = matcher.push(decoder.flush()) + matcher.flush()
                shown += piece
                yield piece
        finally:
            self._settle(segment.state.cache, length, shown)
            rest = time.perf_counter() - first
            self.stats |= {"generated": given, "prefill_ms": 1000 * (first - start)}
            self.stats["ms_per_token"] = 1000 * rest / (given - 1) if given > 1 else 0.0

    def _start(self, limit: int) -> Segment:
        """Begins to decode behind the text; the cache reads what it does not hold yet."""
        held = int(np.asarray(self.cache.lengths)[0])
        missing = np.array([self.tokens[held:]], np.int32)
        self.stats["prefilled"] = missing.shape[1]
        key, eos_id = jax.random.key(self._seed), self.model.config.eos_ids
        request = prepare(self.model.config, missing, limit, self.cache, None, self._sampler, key, eos_id)
        if request.history is not None:  # of the whole text, not of this turn only
            whole, size = np.array([self.tokens], np.int32), bucket(len(self.tokens) + limit)
            lengths = jnp.asarray([len(self.tokens)], jnp.int32)
            padded = np.pad(whole, ((0, 0), (0, bucket(whole.shape[1]) - whole.shape[1])))
            request = dataclasses.replace(request, history=History.of(jnp.asarray(padded), lengths, size))
        return Segment(self.model.params, self.model.config, request)

    def _settle(self, cache: KVCache, start: int, shown: str) -> None:
        """Ends a reply: the text is what was shown of it, and the cache holds no more than the text but its last."""
        reply = self.tokens[start:]
        keep = next(n for n in range(len(reply), -1, -1) if shown.startswith(self._tokenizer.decode(reply[:n])))
        rest = shown[len(self._tokenizer.decode(reply[:keep])) :]
        self.cache = self._cropped(cache, start + keep - (not rest))
        self.tokens[start + keep :] = self._tokenizer.encode(rest) if rest else []

    def _cropped(self, cache: KVCache, length: int) -> KVCache:
        """A cache with no more than so many tokens; an empty one where the layout cannot go back.

        Also where a call that was interrupted has taken the cache with it.
        """
        try:
            return cache.crop(max(0, min(length, int(np.asarray(cache.lengths)[0]))))
        except (CacheError, RuntimeError):
            return self._empty()

    def undo(self) -> None:
        """Takes back the last turn: the conversation is as it was before.

        Raises:
            ChatError: there is none.
        """
        if not self.turns:
            raise ChatError("expected a turn to take back, got none")
        before = self.turns.pop()
        del self.tokens[before:]
        self.cache = self._cropped(self.cache, before - 1)  # what comes next begins with the last token before

    def fork(self) -> "Chat":
        """A conversation of its own with the same past; its cache is a copy."""
        twin = object.__new__(Chat)
        twin.__dict__ |= self.__dict__ | {"tokens": [*self.tokens], "turns": [*self.turns], "stats": {**self.stats}}
        twin.cache = jax.tree.map(jnp.array, self.cache)
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes text, turns and cache to a file, atomically.

        Raises:
            ChatError: it cannot be written.
        """
        saved = _Saved(jnp.asarray(self.tokens, jnp.int32), jnp.asarray(self.turns, jnp.int32), self.cache)
        write_archive(Path(path), saved, _KIND, self._fingerprint())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes text, turns and cache from a file that `save` wrote; where it cannot, the conversation stays as it is.

        Raises:
            ChatError: the file is missing, damaged, no conversation, or of another model.
        """
        saved = read_archive(Path(path), _KIND, self._fingerprint())
        self.tokens, self.turns = np.asarray(saved.tokens).tolist(), np.asarray(saved.turns).tolist()
        self.cache = saved.cache

    def _fingerprint(self) -> str:
        return fingerprint(self.model.params, self.model.config)
