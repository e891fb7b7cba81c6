"""Sessions: texts in progress that can be put aside, saved, and gone on with as if nothing had happened."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.archive import Kind, read_archive, write_archive
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.dynamic import DynamicCache
from llorch_jax.cache.files import CACHE_CLASSES, check_loaded, check_savable
from llorch_jax.checks import check_cache, check_context, check_tokens
from llorch_jax.config import GPT2Config
from llorch_jax.decoding import steps
from llorch_jax.decoding.loop import run_steps
from llorch_jax.decoding.request import Policy, prepare
from llorch_jax.errors import CacheError, CapacityError
from llorch_jax.params import Params
from llorch_jax.sampling import Greedy, History, Mirostat, Sampler, Sampling


@struct.dataclass
class Session:
    """A batch of texts in progress: everything that the next tokens depend on, but for the model.

    Attributes:
        tokens: int32 [B, N], all tokens of each row so far, padded on the right.
        counts: int32 [B], how many there are.
        state: of decoding, with the cache and the newest token of each row.
        policy: the sampler with its settings, the random keys, and the ids that end a row.
        pending: whether the newest token has been sampled but not been given out by `generate`.
    """

    tokens: jax.Array
    counts: jax.Array
    state: steps.DecodeState
    policy: Policy
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
        eos_id: int | Sequence[int] | None = None,
    ) -> "Session":
        """A session that has read its prompts. Arguments and errors are those of `generate_tokens`.

        The cache is donated; None makes a `DynamicCache`.
        """
        prompt = check_tokens(config, prompt_tokens)
        if cache is None:
            cache = DynamicCache.init(config, batch_size=prompt.shape[0])
        request = prepare(config, prompt, 1, cache, lengths, sampler, key, eos_id, room=config.n_positions + 1)
        state = steps.begin(request, *steps.first_logits(params, config, request))
        return cls(prompt, request.lengths, state, request.policy, pending=True)

    def generate(self, params: Params, config: GPT2Config, max_new_tokens: int) -> tuple[jax.Array, "Session"]:
        """The next tokens, and the session after them. This session's cache is donated: go on with the new one.

        However a text is divided into calls, and whether or not the session was saved and loaded between them, its
        tokens are those of one call of `generate_tokens`.

        Args:
            params: of the model that the session was started with.
            config: the model's hyperparameters.
            max_new_tokens: how many, 1 or more.

        Returns:
            int32 [B, max_new_tokens], filled up with the (first) end-of-text id behind a row's end.

        Raises:
            CapacityError: they do not fit the context or the cache; the session stays valid.
        """
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise CapacityError(f"max_new_tokens: expected a whole number from 1 up, got {max_new_tokens!r}")
        count = max_new_tokens - self.pending
        check_cache(config, self.state.cache)
        going_on = count * (1 - np.asarray(self.state.finished).astype(np.int32))
        check_context(config, self.state.cache.lengths, going_on)
        self.state.cache.check_room(going_on)
        finished, first = np.array(self.state.finished), np.array(self.state.token)
        if self.pending:  # whether this very token has ended the row does not matter to its own place in the text
            finished = np.zeros_like(finished)
        new, state = first[:, None][:, : self.pending], self.state
        if count:
            generated, state = run_steps(params, config, self.policy, state, count)
            new = np.concatenate([new, np.asarray(generated.tokens)], axis=1)
        tokens, counts = self._with(new, finished)
        return jax.device_put(new), Session(tokens, counts, state, self.policy, pending=False)

    def _with(self, new: np.ndarray, finished: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Tokens and counts with new tokens [B, N] behind the rows, as far as these had not `finished` [B] before."""
        ended = np.isin(new, np.asarray(self.policy.eos_ids))
        added = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, new.shape[1])
        added = np.where(finished, 0, added).astype(np.int32)
        counts = np.asarray(self.counts)
        tokens = np.zeros((len(counts), int((counts + added).max())), np.int32)
        for row, (count, more) in enumerate(zip(counts, added, strict=True)):
            tokens[row, :count] = self.tokens[row, :count]
            tokens[row, count : count + more] = new[row, :more]
        return jax.device_put(tokens), jnp.asarray(counts + added)


def _check_loaded(session: Session) -> None:
    """Raises CacheError unless the fields of a session that was read from a file fit each other."""
    if not isinstance(session.state.cache, KVCache):
        raise CacheError(f"expected a session with a cache, got {session.state.cache!r:.80}")
    check_loaded(session.state.cache)


_CLASSES = (Session, steps.DecodeState, Policy, History, Greedy, Sampling, Mirostat, *CACHE_CLASSES)
_KIND = Kind("session", Session, _CLASSES, CacheError, _check_loaded)


def save_session(path: str | os.PathLike[str], session: Session, *, fingerprint: str = "") -> None:
    """Writes a session to a file, atomically; the session stays valid.

    Args:
        path: of the file, by custom `.safetensors`.
        session: what to save.
        fingerprint: of the model, from `fingerprint`; `load_session` compares it.

    Raises:
        CacheError: the session's cache was donated, its sampler or eviction policy is a function of your own, or the
            file cannot be written.
    """
    check_savable(session.state.cache)
    write_archive(Path(path), session, _KIND, fingerprint)


def load_session(path: str | os.PathLike[str], *, fingerprint: str | None = None) -> Session:
    """The session that `save_session` wrote; it goes on with the tokens that it would have had.

    Args:
        path: of the file.
        fingerprint: of the model that will use it, from `fingerprint`; None does not compare.

    Raises:
        CacheError: the file is missing, truncated, corrupt, no session, of another format, or of another model.
    """
    return read_archive(Path(path), _KIND, fingerprint)
