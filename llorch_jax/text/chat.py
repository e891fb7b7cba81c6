"""A conversation with a model: its text, the cache of it, and how turns are written. No terminal here.

The cache is kept from turn to turn: only text that it does not hold is prefilled.
"""

import dataclasses
import os
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.archive import read_archive, write_archive
from llorch_jax.buckets import bucket
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.files import fingerprint
from llorch_jax.decoding.overflow import check_overflow
from llorch_jax.decoding.request import prepare
from llorch_jax.decoding.streaming import Segment
from llorch_jax.errors import CacheError, CapacityError, ChatError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import History
from llorch_jax.text.conversation_file import CONVERSATION, SavedConversation
from llorch_jax.text.ending import Ending, Transcript
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.prompts import key_of_seed
from llorch_jax.text.timing import Stopwatch, Timings
from llorch_jax.text.vocabulary import tokenizer_of
from llorch_jax.tracing import whole


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are written. Models that were not trained on conversations have none; plain roles often work.

    Attributes:
        before: text before the user's text.
        after: text after the user's text, which introduces the reply.
        stops: texts before which a reply ends.
    """

    before: str = "\nUser: "
    after: str = "\nAssistant:"
    stops: tuple[str, ...] = ("\nUser:",)


RAW = Template("", "", ())  # the model continues the text


Ended = Literal["stop", "length", "context", "closed"]


@dataclasses.dataclass
class Turn:
    """One turn of a conversation.

    Attributes:
        start: number of tokens before the turn.
        reply: number of tokens before the reply.
        prefilled: tokens that the cache did not hold yet.
        generated: tokens of the reply as they were generated.
        timings: of the reply; None in a turn that was loaded from a file.
        ended: why the reply ended: an end-of-text id or stop string, its maximum length, a full context, or because
            the iterator was closed. None where that is unknown.
    """

    start: int
    reply: int
    prefilled: int = 0
    generated: int = 0
    timings: Timings | None = None
    ended: Ended | None = None


class Chat:
    """A conversation in progress.

    Attributes:
        tokens: ids of the whole text.
        turns: the turns so far.
        system: text that the conversation began with.
    """

    def __init__(self, model: Model, template: Template = RAW, *, system: str = "", **options: Any) -> None:
        """An empty conversation, or one that begins with the text `system`.

        Args:
            model: from `load`.
            template: how turns are written; `RAW` for none.
            system: text at the start of the conversation.
            options: as in `generate`; see docs/options.md for those that apply.

        Raises:
            OptionError, CacheError, SamplerError, ModelError: as `generate`.
        """
        self.options = GenerationOptions.create(**options)
        self.options.check_method("chat")
        self.options.check_model(model)
        self.model = model
        self.template = template
        self.layout: Any = self.options.cache
        self.system = system
        assert isinstance(self.options.seed, int)  # several are refused above
        self._seed = self.options.seed
        self._sampler = self.options.sampler_for(model)
        self._tokenizer = tokenizer_of(model)
        self._begin()

    def _begin(self) -> None:
        self._speaking = False  # whether a reply is under way, which has the cache
        self.tokens: list[int] = self._tokenizer.encode(self.system, add_special_tokens=True) if self.system else []
        self.turns: list[Turn] = []
        self.cache = self._empty()

    def _empty(self) -> KVCache:
        return self.options.fitted_cache(self.model.config, 1, self.model.config.n_positions, self.model.params.mesh)

    @property
    def context(self) -> int:
        """Maximum number of tokens: the model's context, or the cache's capacity if that is less."""
        return min(self.model.config.n_positions, self.cache.capacity)

    @property
    def text(self) -> str:
        """The whole text."""
        return self._tokenizer.decode(self.tokens)

    def reply(self, words: str, max_new_tokens: int | None = None) -> Generator[str, None, None]:
        """Adds a turn and yields the reply in pieces, as `stream` does. Pieces become part of the text when yielded.

        Closing the iterator ends the reply. `max_new_tokens` replaces the option of this name.

        Raises:
            ChatError: there is no text to continue, or `words` is not a text.
            CapacityError: the turn does not fit into the context. The conversation is unchanged.
        """
        self._check_quiet()
        if not isinstance(words, str):
            raise ChatError(f"words: expected a text, got {words!r:.80}")
        written = self.template.before + words + self.template.after
        new = self._tokenizer.encode(written, add_special_tokens=not self.tokens)
        return self._checked(new, max_new_tokens, self._seed)

    def regenerate(self, max_new_tokens: int | None = None, *, seed: int | None = None) -> Generator[str, None, None]:
        """Removes the last reply and yields another one to the same text.

        Args:
            max_new_tokens: maximum number of new tokens; None for that of the options.
            seed: of the draws; the conversation's seed would draw the same reply again. None derives one from the
                reply.

        Raises:
            ChatError: there is no turn.
        """
        self._check_quiet()
        if not self.turns:
            raise ChatError("expected a turn with a reply to take back, got none")
        turn = self.turns[-1]
        new = self.tokens[turn.start : turn.reply]
        if seed is None:
            reply = np.asarray(self.tokens[turn.reply :], np.int32)
            seed = zlib.crc32(reply.tobytes(), self._seed % 2**32)
        self.undo()
        return self._checked(new, max_new_tokens, seed)

    def _checked(self, new: list[int], most: int | None, seed: int) -> Generator[str, None, None]:
        (limit,) = self.options.limits(1)
        max_new_tokens = limit if most is None else whole("max_new_tokens", most, CapacityError)
        context = self.context
        if len(self.tokens) + len(new) + max_new_tokens > context:
            self._forget(context - len(new) - 1)
        room = context - len(self.tokens) - len(new)
        if not self.tokens and not new:
            raise ChatError("expected some text to continue, got none")
        if room < 1:
            left = max(0, context - len(self.tokens) - 1)
            raise CapacityError(
                f"expected a turn of {left} tokens or fewer, which the context of {context} has left, got {len(new)}; "
                "take back a turn or begin a new conversation"
            )
        return self._reply(new, min(max_new_tokens, room), "length" if max_new_tokens <= room else "context", seed)

    def _forget(self, most: int) -> None:
        """Keeps only the first and newest tokens if `overflow` says so and these are no more than `most`.

        They are encoded again with the next turn. Turns that have lost a token can no longer be removed.
        """
        reencode = check_overflow(self.options.overflow)
        if reencode is None:
            return
        kept = reencode.kept(np.asarray(self.tokens, np.int32), self.context).tolist()
        lost = len(self.tokens) - len(kept)
        if lost == 0 or len(kept) > most:
            return
        self.tokens = kept
        self.turns = [
            dataclasses.replace(turn, start=turn.start - lost, reply=turn.reply - lost)
            for turn in self.turns
            if turn.start >= reencode.sinks + lost
        ]
        self.cache = self._empty()

    def _reply(self, new: list[int], limit: int, at_limit: Ended, seed: int) -> Generator[str, None, None]:
        self._check_quiet()  # again, as this runs when the first piece is asked for
        before = len(self.tokens)
        turn = Turn(before, before + len(new), timings=Timings(0.0, 0.0, 0.0, 0), ended="closed")
        watch = Stopwatch()
        self.turns.append(turn)
        self.tokens += new
        try:
            segment = self._start(turn, limit, seed)
        except BaseException:  # the cache has been donated
            del self.tokens[before:], self.turns[-1]
            self.cache = self._empty()
            raise
        ending = self._ending(limit)
        transcript = Transcript(self._tokenizer, ending)
        try:
            self._speaking = True
            for step in segment.run():
                turn.generated += 1
                turn.timings = _timed(turn, watch)
                token = int(step.token[0])
                piece = transcript.push(token)
                if token not in ending.ids:  # an id that ends the reply is not part of the text
                    self.tokens.append(token)
                if transcript.finish_reason is not None:
                    turn.ended = "stop" if transcript.finish_reason == "stop" else at_limit
                yield piece
                if transcript.finish_reason is not None:
                    return
                watch.skip()  # what the caller did with the piece
        finally:
            self._speaking = False
            self._settle(segment.state.cache, turn.reply, transcript.text)

    def _ending(self, limit: int) -> Ending:
        """When a reply of at most `limit` tokens ends."""
        own = Ending.of(self.model, self.options, limit)
        return dataclasses.replace(own, stops=(*self.template.stops, *own.stops))

    def _start(self, turn: Turn, limit: int, seed: int) -> Segment:
        """Begins to decode after the text; the cache reads what it does not hold yet."""
        held = int(np.asarray(self.cache.lengths)[0])
        missing = np.array([self.tokens[held:]], np.int32)
        turn.prefilled = missing.shape[1]
        eos_ids = self._ending(limit).ids
        request = prepare(
            self.model.config,
            missing,
            limit,
            self.cache,
            None,
            self._sampler,
            key_of_seed(seed),
            eos_ids,
            mesh=self.model.params.mesh,
        )
        if request.history is not None:  # of the whole text, not of this turn only
            text = np.array([self.tokens], np.int32)
            padded = np.pad(text, ((0, 0), (0, bucket(text.shape[1]) - text.shape[1])))
            lengths = jnp.asarray([text.shape[1]], jnp.int32)
            history = History.of(jnp.asarray(padded), lengths, bucket(text.shape[1] + limit))
            request = dataclasses.replace(request, history=history)
        return Segment(self.model.params, self.model.config, request)

    def _settle(self, cache: KVCache, start: int, shown: str) -> None:
        """Ends a reply: the text keeps what was shown, and the cache holds at most all of its tokens but the last."""
        reply = self.tokens[start:]
        keep = next(n for n in range(len(reply), -1, -1) if shown.startswith(self._tokenizer.decode(reply[:n])))
        rest = shown[len(self._tokenizer.decode(reply[:keep])) :]
        self.cache = self._cropped(cache, start + keep - (not rest))
        self.tokens[start + keep :] = self._tokenizer.encode(rest) if rest else []

    def _cropped(self, cache: KVCache, length: int) -> KVCache:
        """A cache with at most `length` tokens; an empty one if the layout cannot roll back that far.

        It is also empty if the cache was donated to an interrupted call.
        """
        try:
            return cache.crop(max(0, min(length, int(np.asarray(cache.lengths)[0]))))
        except (CacheError, RuntimeError):
            return self._empty()

    def undo(self) -> None:
        """Removes the last turn: the conversation is as it was before it.

        Raises:
            ChatError: there is none.
        """
        self._check_quiet()
        if not self.turns:
            raise ChatError("expected a turn to take back, got none")
        before = self.turns.pop().start
        del self.tokens[before:]
        self.cache = self._cropped(self.cache, before - 1)  # what comes next begins with the last token before

    def new(self) -> None:
        """Begins a new conversation, with the same system text."""
        self._check_quiet()
        self._begin()

    def fork(self) -> "Chat":
        """An independent conversation with the same past; its cache is a copy."""
        self._check_quiet()
        twin = object.__new__(Chat)
        twin.__dict__ |= self.__dict__ | {"tokens": [*self.tokens], "turns": [*self.turns]}
        twin.cache = jax.tree.map(jnp.array, self.cache)
        return twin

    def save(self, path: str | os.PathLike[str], *, with_cache: bool = True) -> None:
        """Writes text, turns and cache to a file, atomically.

        Args:
            path: of the file.
            with_cache: whether to write the cache too; without it the file is small, and the first reply after `load`
                reads the whole text again.

        Raises:
            ChatError: it cannot be written.
        """
        if with_cache:
            self._check_quiet()
        tokens = jnp.asarray(self.tokens, jnp.int32)
        turns = np.array([(turn.start, turn.reply) for turn in self.turns], np.int32).reshape(-1, 2)
        saved = SavedConversation(tokens, jnp.asarray(turns), self.cache if with_cache else None)
        write_archive(Path(path), saved, CONVERSATION, self._fingerprint())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes text, turns and cache from a file that `save` wrote; if that fails, the conversation is unchanged.

        Raises:
            ChatError: the file is missing or damaged, or is not a conversation with this model.
        """
        self._check_quiet()
        saved = read_archive(Path(path), CONVERSATION, self._fingerprint())
        if np.asarray(saved.tokens).max(initial=0) >= self.model.config.vocab_size:
            raise ChatError(f"{path}: expected token ids below vocab_size={self.model.config.vocab_size}, got others")
        self.tokens = np.asarray(saved.tokens).tolist()
        self.turns = [Turn(start, reply) for start, reply in np.asarray(saved.turns).tolist()]
        self.cache = self._empty() if saved.cache is None else saved.cache

    def _check_quiet(self) -> None:
        """Raises ChatError while a reply is under way."""
        if self._speaking:
            raise ChatError("expected the reply before to be read to its end or closed, got one that is under way")

    def _fingerprint(self) -> str:
        return fingerprint(self.model.params, self.model.config)


def _timed(turn: Turn, watch: Stopwatch) -> Timings:
    """The timings of a turn after one more token."""
    lap = watch.lap()
    before = turn.timings or Timings(0.0, 0.0, 0.0, 0)
    prefill = lap if turn.generated == 1 else before.prefill
    decode = 0.0 if turn.generated == 1 else before.decode + lap
    return Timings(watch.compile, prefill, decode, turn.generated)
