"""A conversation in a file: what is written, and the checks of what is read."""

from typing import Any

import jax
import numpy as np
from flax import struct

from llorch_jax.archive import Kind
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.files import CACHE_CLASSES
from llorch_jax.errors import ChatError


@struct.dataclass
class SavedConversation:
    """A conversation in a file.

    Attributes:
        tokens: int32 [N], of the whole text.
        turns: int32 [T, 2], numbers of tokens before each turn and before its reply.
        cache: None where it was not saved.
    """

    tokens: jax.Array
    turns: jax.Array
    cache: Any


def _check_loaded(saved: SavedConversation) -> None:
    """Raises ChatError unless the fields of a conversation that was read from a file fit each other."""
    tokens = np.asarray(saved.tokens)
    turns = np.asarray(saved.turns)
    for name, array, shape in (("tokens", tokens, (tokens.size,)), ("turns", turns, (turns.size // 2, 2))):
        if array.shape != shape or array.dtype != np.int32 or array.min(initial=0) < 0:
            raise ChatError(f"{name}: expected int32 {list(shape)} of 0 or greater, got {array.dtype} {[*array.shape]}")
    if np.any(np.diff([0, *turns.ravel(), len(tokens)]) < 0):
        raise ChatError(f"turns: expected ascending numbers up to {len(tokens)}, got {turns.tolist()!r:.80}")
    if saved.cache is None:
        return
    if not isinstance(saved.cache, KVCache):
        raise ChatError(f"cache: expected one, got {saved.cache!r:.80}")
    saved.cache.check_fields()
    lengths = np.asarray(saved.cache.lengths)
    if lengths.shape != (1,) or lengths[0] > len(tokens):
        raise ChatError(f"cache: expected one row of no more than {len(tokens)} tokens, got lengths {lengths!r:.80}")


CONVERSATION = Kind("conversation", SavedConversation, (SavedConversation, *CACHE_CLASSES), ChatError, _check_loaded)
