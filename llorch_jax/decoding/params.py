"""How tokens are chosen and when rows end, in the form that the compiled programs take."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llorch_jax.buckets import power_of_two
from llorch_jax.config import GPT2Config
from llorch_jax.errors import SamplerError, TokenError
from llorch_jax.sampling import Greedy, Sampler, check_sampler
from llorch_jax.tracing import is_whole, whole

EosIds = int | Sequence[int] | Sequence[Sequence[int]] | Literal["config"] | None
"""Ids that end a row: "config" for the configuration's own, one id, several, or several per row; None for none."""


@struct.dataclass
class DecodingParams:
    """How the next token is chosen, and which tokens end a row.

    Attributes:
        sampler: from logits to ids.
        keys: one per row [B]; the key of a token is this one folded with the token's position.
        eos_ids: int32 [B, E], ids that end a row, filled up with -1; E may be 0.
        top_logprobs: number of alternatives to record at every step.
    """

    sampler: Any
    keys: Any
    eos_ids: Any
    top_logprobs: int = struct.field(pytree_node=False, default=0)

    def __repr__(self) -> str:
        return f"DecodingParams({self.sampler!r}, {self.eos_ids.shape[0]} rows)"

    @property
    def filler(self) -> jax.Array:
        """int32 [B], the token that stands after a row's end: its first end-of-text id, or 0."""
        if self.eos_ids.shape[1] == 0:
            return jnp.zeros(self.eos_ids.shape[0], jnp.int32)
        return jnp.maximum(self.eos_ids[:, 0], 0)

    def ends(self, tokens: jax.Array) -> jax.Array:
        """bool [B, ...], which of the tokens int32 [B, ...] end their row."""
        ids = self.eos_ids.reshape(tokens.shape[0], *[1] * (tokens.ndim - 1), -1)
        return jnp.any(tokens[..., None] == ids, axis=-1)

    def ends_on_host(self, tokens: np.ndarray) -> np.ndarray:
        """`ends` by NumPy, of tokens int32 [B, ...] that are known."""
        ids = np.asarray(self.eos_ids).reshape(len(tokens), *[1] * (tokens.ndim - 1), -1)
        return np.any(tokens[..., None] == ids, axis=-1)

    def filler_on_host(self) -> np.ndarray:
        """`filler` by NumPy."""
        ids = np.asarray(self.eos_ids)
        return np.maximum(ids[:, 0], 0) if ids.shape[1] else np.zeros(len(ids), np.int32)


def decoding_params(
    config: GPT2Config, batch: int, sampler: Sampler | None, key: Any, eos_id: EosIds, top_logprobs: int = 0
) -> DecodingParams:
    """Checked parameters for `batch` rows; arguments and errors as `generate_tokens`.

    Raises:
        SamplerError: the sampler is not one or names ids outside the vocabulary, or the key is missing or not a key.
        TokenError: an end-of-text id is outside the vocabulary.
    """
    chosen = Greedy() if sampler is None else sampler
    check_sampler(chosen, config.vocab_size)
    whole("top_logprobs", top_logprobs, SamplerError, least=0, most=config.vocab_size)
    keys = _row_keys(chosen, key, batch)
    return DecodingParams(chosen, keys, jax.device_put(eos_rows(config, eos_id, batch)), top_logprobs)


def _row_keys(sampler: Sampler, key: Any, batch: int) -> jax.Array:
    """One key per row [B]."""
    if key is None:
        if sampler.needs_key:
            raise SamplerError("key: expected a jax.random.key for a sampler that draws, got None")
        key = jax.random.key(0)
    key = _typed_key(key)
    if key.shape == (batch,):
        return key
    if key.shape != ():
        raise SamplerError(f"key: expected one key or {batch}, one per row, got shape {list(key.shape)}")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def _typed_key(key: Any) -> jax.Array:
    """A key of `jax.random.key`; the raw uint32 data of a `jax.random.PRNGKey` are wrapped."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype == jnp.uint32 and key.shape[-1:] == jax.random.key_data(jax.random.key(0)).shape:
        return jax.random.wrap_key_data(jnp.asarray(key))
    got = type(key).__name__ if dtype is None else f"an array of dtype {dtype} and shape {list(key.shape)}"
    raise SamplerError(f"key: expected a jax.random.key, got {got}")


def eos_rows(config: GPT2Config, eos_id: EosIds, batch: int) -> np.ndarray:
    """int32 [B, E] of checked ids, filled up with -1; E is a power of two, so that few sizes are compiled, or 0.

    Raises:
        TokenError: they are not ids of the vocabulary, or for another number of rows.
    """
    rows = _id_rows(config, eos_id, batch)
    for value in (value for row in rows for value in row):
        if not is_whole(value) or not 0 <= value < config.vocab_size:
            raise TokenError(f"eos_id: expected ids in 0 .. {config.vocab_size - 1}, got {value!r:.80}")
    out = np.full((batch, power_of_two(max(map(len, rows)))), -1, np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def _id_rows(config: GPT2Config, eos_id: EosIds, batch: int) -> list[list[Any]]:
    """The ids of each row, not yet checked."""
    if isinstance(eos_id, str):
        if eos_id != "config":
            raise TokenError(f"eos_id: expected ids, None or 'config', got {eos_id!r:.80}")
        return [list(config.eos_ids)] * batch
    if eos_id is None:
        return [[]] * batch
    if isinstance(eos_id, jax.Array | np.ndarray):
        eos_id = np.asarray(eos_id).tolist()
    if not isinstance(eos_id, Sequence):
        return [[eos_id]] * batch
    if not eos_id or not all(isinstance(row, Sequence | np.ndarray) for row in eos_id):
        return [list(eos_id)] * batch
    if len(eos_id) != batch:
        raise TokenError(f"eos_id: expected ids for {batch} rows, got {len(eos_id)} lists")
    return [list(row) for row in eos_id]  # type: ignore[arg-type]
