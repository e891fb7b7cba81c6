"""Attention over the slots of a cache, by native kernels.

A kernel makes one pass over the keys and values as they are stored, in slots or in pages, with an online softmax;
nothing is gathered or decoded in memory, and blocks of slots that no query may attend to are skipped. Blocks have fixed
boundaries, so that a query's result has the same bits whatever the other rows contain, however many empty slots follow
and however many threads there are. One kernel is for the few queries of a decode step, which are as fast as memory;
another, for the many of a prompt, attends to panels of queries. See docs/kernels.md.
"""

import dataclasses
from functools import cache, partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.kernels import calls
from llorch_jax.kernels.library import available

_MAX_TOKENS = 16  # queries T per row; more of them, or more than the next limits, are attended to in panels
_CHUNK = 256  # slots per task
_MAX_QUERIES = 64  # queries that share a key/value head
_MAX_HEAD = 256  # elements of a padded vector, in panels
_MAX_SCRATCH = 4096  # elements of those queries, padded


class Vectors(NamedTuple):
    """Keys or values as a codec stores them.

    Attributes:
        rows: [B, K, S, ...], or with tables [pages, K, page_size, ...]: float32, float16 or uint16 (bits of bfloat16)
            [..., H]; int8 codes [..., H]; or uint8 pairs of 4-bit codes [..., ceil(H / 2)], element i in the low nibble
            of byte i, element i + ceil(H / 2) in its high nibble.
        scales: float32 [..., 1] for codes; otherwise [0].
        zeros: float32 [..., 1] for 4-bit codes, the value of code 0; otherwise [0].
    """

    rows: jax.Array
    scales: jax.Array
    zeros: jax.Array


class Exact(NamedTuple):
    """Exact vectors of some tokens: the token at position p is at index (p - start) % R if that is marked with p.

    Attributes:
        keys: float32 [B, K, R, H].
        values: float32 [B, K, R, H].
        positions: int32 [B, R].
        starts: int32 [B].
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    starts: jax.Array


class Operands(NamedTuple):
    """The kernel's inputs.

    Attributes:
        q: float32 [B, T, N, H].
        query_positions: int32 [B, T].
        keys, values: as stored.
        positions: int32 [B or 1, K or 1, S], position of the token in each slot; negative if the slot is empty.
        tables: int32 [B, N], the page of each block of page_size slots; [0, 0] if there are no pages.
        exact: up to two sets of exact vectors; later ones take precedence.
    """

    q: jax.Array
    query_positions: jax.Array
    keys: Vectors
    values: Vectors
    positions: jax.Array
    tables: jax.Array
    exact: tuple[Exact, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """The static settings of a call.

    Attributes:
        bits: bits per stored element: 32, 16, 8 or 4.
        scale: factor of the scores.
        window: the model's sliding window, including the query's own token; 0 for none.
        view_window: the cache's window; 0 for none.
        sinks: number of first positions that are visible regardless of view_window.
    """

    bits: int
    scale: float
    window: int = 0
    view_window: int = 0
    sinks: int = 0


class Call(Protocol):
    """Attention over given arrays, computed in either of two ways; hashable, so that it can be static in `jit`."""

    def __hash__(self) -> int: ...

    def operands(self, *arrays: jax.Array) -> Operands:
        """The kernel's inputs."""
        ...

    def plain(self, *arrays: jax.Array) -> jax.Array:
        """The same attention in jnp, float32 [B, T, N, H]; used for derivatives and `vmap`."""
        ...


def serves(form: Form, q: jax.Array, kv_heads: int, exact: int) -> bool:
    """Whether `attend` supports these queries, on a single CPU device or inside `shard_map`.

    Args:
        form: static settings of the view.
        q: [B, T, N, H].
        kv_heads: number of key/value heads K.
        exact: number of sets of exact vectors.
    """
    fits = _few(form, q, kv_heads) or _padded(q.shape[3], form.bits) <= _MAX_HEAD
    return q.size > 0 and fits and exact <= 2 and q.dtype == jnp.float32 and available()


def _few(form: Form, q: jax.Array, kv_heads: int) -> bool:
    """Whether all queries q [B, T, N, H] of a key/value head are attended to at once, over chunks of slots."""
    _, tokens, heads, head_dim = q.shape
    queries = tokens * heads // max(kv_heads, 1)
    fits = queries <= _MAX_QUERIES and queries * _padded(head_dim, form.bits) <= _MAX_SCRATCH
    return tokens <= _MAX_TOKENS and fits


def attend(form: Form, call: Call, *arrays: jax.Array) -> jax.Array:
    """Softmax attention float32 [B, T, N, H].

    For a query that may attend to no slot, the result is zero.

    Args:
        form: static settings.
        call: how to interpret the arrays, the first of which holds the queries.
        arrays: arrays that `serves` has accepted.
    """
    q = arrays[0]
    return calls.call(_native_of(form, call), _plain_of(call), q.shape, jnp.float32, *arrays)


@cache
def _native_of(form: Form, call: Call) -> calls.Function:
    return partial(_native, form, call)


@cache
def _plain_of(call: Call) -> calls.Function:
    return call.plain  # a bound method would be another function every time


def _padded(head_dim: int, bits: int) -> int:
    parts = 2 if bits == 4 else 1
    return parts * (-(-head_dim // (16 * parts)) * 16)


def _native(form: Form, call: Call, *arrays: jax.Array) -> jax.Array:
    operands = call.operands(*arrays)
    batch, tokens, heads, head_dim = operands.q.shape
    few = _few(form, operands.q, operands.keys.rows.shape[1])
    chunks = -(-operands.positions.shape[2] // _CHUNK) if few else 0
    floats = batch * tokens * heads * chunks * (_padded(head_dim, form.bits) + 2)
    out = jax.ShapeDtypeStruct(operands.q.shape, jnp.float32)
    target = jax.ffi.ffi_call("llorch_attention", (out, jax.ShapeDtypeStruct((4 * floats,), jnp.uint8)))
    return target(
        *jax.tree.leaves(operands),
        bits=np.int64(form.bits),
        window=np.int64(form.window),
        view_window=np.int64(form.view_window),
        sinks=np.int64(form.sinks),
        scale=np.float32(form.scale),
    )[0]
