"""Sessions: texts in progress that can be put aside, saved, and continued as if nothing had happened."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import struct

from llorch_jax.archive import Kind, read_archive, write_archive
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.files import CACHE_CLASSES, check_savable
from llorch_jax.cache.placement import new_cache, placed
from llorch_jax.checks import check_cache, check_context, check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.decoding import steps
from llorch_jax.decoding.loop import run_steps
from llorch_jax.decoding.params import DecodingParams, EosIds
from llorch_jax.decoding.request import new_token_counts, prepare
from llorch_jax.errors import CacheError, SessionError
from llorch_jax.params import Params
from llorch_jax.sampling import Greedy, History, Mirostat, Sampler, Sampling, check_sampler


@struct.dataclass
class Session:
    """A batch of texts in progress: everything that the next tokens depend on, except the model.

    Attributes:
        tokens: int32 [B, N], all tokens of each row so far, padded on the right.
        counts: int32 [B], how many there are.
        state: of decoding, with the cache and the newest token of each row.
        decoding: the sampler with its settings, the random keys, and the ids that end a row.
        pending: whether the newest token has been sampled but not yet returned by `generate`.
    """

    tokens: Any
    counts: Any
    state: steps.DecodeState
    decoding: DecodingParams
    pending: bool = struct.field(pytree_node=False)

    @classmethod
    def start(
        cls,
        params: Params,
        config: GPT2Config,
        prompt_tokens: Any,
        cache: KVCache | None = None,
        lengths: Any = None,
        sampler: Sampler | None = None,
        key: jax.Array | None = None,
        eos_id: EosIds = "config",
    ) -> "Session":
        """A session that has read its prompts. Arguments and errors are those of `generate_tokens`.

        The cache is donated; None makes a `DynamicCache`.
        """
        prompt = check_tokens(config, prompt_tokens)
        if cache is None:
            cache = new_cache(params.mesh, DynamicCache.init, config, batch_size=prompt.shape[0])
        room = config.n_positions + 1
        request = prepare(config, prompt, 1, cache, lengths, sampler, key, eos_id, room=room, mesh=params.mesh)
        state = steps.start(params, config, request)
        steps.check_chosen(np.array(state.token)[:, None], np.array(state.logprob)[:, None])
        tokens, lengths = jax.device_put((prompt, request.lengths))
        return cls(tokens, lengths, state, request.decoding, pending=True)

    def __repr__(self) -> str:
        return f"Session({len(self.counts)} rows of up to {self.tokens.shape[1]} tokens, {self.state!r})"

    def generate(
        self, params: Params, config: GPT2Config, max_new_tokens: int | Sequence[int]
    ) -> tuple[jax.Array, "Session"]:
        """The next tokens, and the session after them. This session's cache is donated: continue with the new one.

        However a text is divided into calls, and whether or not the session was saved and loaded between them, its
        tokens are those of one call of `generate_tokens`.

        Args:
            params: of the model that the session was started with.
            config: the model's hyperparameters.
            max_new_tokens: maximum number of new tokens of each row, one number or a sequence of B, 1 or more.

        Returns:
            int32 [B, N], N the largest `max_new_tokens`, filled up with the row's (first) end-of-text id, or 0, after
            its end.

        Raises:
            CapacityError: they do not fit the context or the cache; the session stays valid.
            CacheError: the session has been continued already, which donated its cache.
            SamplerError, NonFiniteError: as `generate_tokens`; the session cannot be continued then.
        """
        wanted = new_token_counts(max_new_tokens, len(self.counts))
        check_cache(config, self.state.cache)  # before anything of the state is read, which was donated with it
        finished = np.array(self.state.finished)
        counts = wanted - self.pending
        needed = np.where(finished, 0, counts)
        check_context(config, self.state.cache.lengths, needed)
        self.state.cache.check_room(needed)
        new, state = np.array(self.state.token)[:, None][:, : self.pending], placed(params.mesh, self.state)
        if counts.any():
            generated, state = run_steps(params, config, placed(params.mesh, self.decoding), state, counts)
            new = np.concatenate([new, np.asarray(generated.tokens)], axis=1)
        # A pending token belongs to the text even where it has ended its row.
        got = self.pending + np.where(finished, 0, counts - np.asarray(state.remaining)) * bool(counts.any())
        tokens, lengths = self._with(new, got.astype(np.int32))
        return jax.device_put(new), Session(tokens, lengths, state, self.decoding, pending=False)

    def _with(self, new: np.ndarray, added: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Tokens and counts with the first `added` int32 [B] of the new tokens [B, N] after each row's."""
        counts = np.asarray(self.counts)
        tokens = np.zeros((len(counts), int((counts + added).max())), np.int32)
        for row, (count, more) in enumerate(zip(counts, added, strict=True)):
            tokens[row, :count] = np.asarray(self.tokens)[row, :count]
            tokens[row, count : count + more] = new[row, :more]
        return jax.device_put((tokens, counts + added))


SESSION_CLASSES = (Session, steps.DecodeState, DecodingParams, History, Greedy, Sampling, Mirostat, *CACHE_CLASSES)


def _check_loaded(session: Session) -> None:
    """Raises SessionError or CacheError unless the fields of a session that was read from a file fit each other."""
    cache = session.state.cache
    if not isinstance(cache, KVCache):
        raise SessionError(f"expected a session with a cache, got {type(cache).__name__}")
    cache.check_fields()
    check_sampler(session.decoding.sampler, np.iinfo(np.int32).max)
    state, rows = session.state, (cache.batch_size,)
    vectors = {"counts": session.counts, "token": state.token, "finished": state.finished, "remaining": state.remaining}
    vectors |= {"keys": session.decoding.keys, "eos_ids": session.decoding.eos_ids, "tokens": session.tokens}
    for name, value in vectors.items():
        axes = 2 if name in ("eos_ids", "tokens") else 1
        if not isinstance(value, jax.Array) or value.ndim != axes or value.shape[:1] != rows:
            raise SessionError(f"{name}: expected an array of {rows[0]} rows and {axes} axes, got {value!r:.80}")
    counts = np.asarray(session.counts)
    if counts.min() < 1 or counts.max() > session.tokens.shape[1]:
        raise SessionError(
            f"counts: expected 1 .. {session.tokens.shape[1]} tokens in every row, got {counts.tolist()}"
        )


_KIND = Kind("session", Session, SESSION_CLASSES, SessionError, _check_loaded)


def save_session(path: str | os.PathLike[str], session: Session, *, fingerprint: str = "") -> None:
    """Writes a session to a file, atomically; the session stays valid.

    Args:
        path: of the file, usually with the suffix `.safetensors`.
        session: what to save.
        fingerprint: of the model, from `fingerprint`; `load_session` compares it.

    Raises:
        SessionError: the session's cache was donated, its sampler or eviction policy is a function of your own, or the
            file cannot be written.
    """
    try:
        check_savable(session.state.cache)
    except CacheError as error:
        raise SessionError(f"session: {error}") from None
    write_archive(Path(path), session, _KIND, fingerprint)


def load_session(path: str | os.PathLike[str], *, fingerprint: str | None = None) -> Session:
    """The session that `save_session` wrote; it continues with the tokens that it would have had.

    Args:
        path: of the file.
        fingerprint: of the model that will use it, from `fingerprint`; None does not compare.

    Raises:
        SessionError: the file is missing, truncated, corrupt, not a session, of another format, or of another model.
    """
    return read_archive(Path(path), _KIND, fingerprint)
