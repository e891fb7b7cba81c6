"""The prefix cache on disk: pages and their tokens, in one file that is written atomically and checked when read."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.archive import Kind, read_archive, write_archive
from llorch_jax.cache.codecs import FloatCodec, IntegerCodec, Quantized, Stored
from llorch_jax.cache.fields import check_range
from llorch_jax.cache.paged import PagedCache
from llorch_jax.engine.copies import pools_of
from llorch_jax.engine.device import Device
from llorch_jax.engine.host_pages import HostPages
from llorch_jax.engine.pages import PagePool
from llorch_jax.errors import EngineError

_DIGEST = re.compile("[0-9a-f]{32}")  # bytes.fromhex would also take spaces and capitals


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """The indexed pages of an engine, those of the second pool first, and in each the least recently used first.

    Attributes:
        codec: how keys and values are stored.
        keys: for each layer, stored keys [P, K, page_size, ...].
        values: for each layer, stored values.
        tokens: int32 [P, page_size].
        digests: for each page, the digest of all tokens up to its end, in hexadecimal.
    """

    codec: FloatCodec | IntegerCodec
    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    tokens: jax.Array
    digests: tuple[str, ...]


_KIND = Kind("prefix cache", Prefixes, (Prefixes, FloatCodec, IntegerCodec, Quantized), EngineError, lambda found: None)


def save_prefixes(path: Path, cache: PagedCache, pages: PagePool, store: HostPages, fingerprint: str) -> int:
    """Writes the indexed pages of both pools, each page once, and returns their number.

    Raises:
        EngineError: the file cannot be written.
    """
    own = pages.entries()
    numbers = jnp.asarray(np.array([page for page, _, _ in own], np.int32))
    others = [entry for entry in store.entries() if not pages.knows(entry[1])]
    rows = [row for row, _, _ in others]
    entries = others + own
    codec = cache.codec
    assert isinstance(codec, FloatCodec | IntegerCodec)

    def taken(pool: jax.Array, second: np.ndarray | None = None) -> jax.Array:
        found = jnp.take(pool, numbers, axis=0)
        return found if second is None else jnp.concatenate([jnp.asarray(second[rows]), found])

    pools = pools_of(cache)
    keys, values = jax.tree.map(taken, pools, store.arrays) if others else jax.tree.map(taken, pools)
    tokens = [np.frombuffer(content, np.int32) for _, _, content in entries]
    found = Prefixes(
        codec=codec,
        keys=keys,
        values=values,
        tokens=jnp.asarray(np.array(tokens, np.int32).reshape(len(entries), pages.page_size)),
        digests=tuple(digest.hex() for _, digest, _ in entries),
    )
    write_archive(path, found, _KIND, fingerprint)
    return len(entries)


def load_prefixes(
    path: Path, device: Device, pages: PagePool, store: HostPages, fingerprint: str, vocab_size: int
) -> int:
    """Reads pages from a file into the cache, as many as there are free pages, and others into the second pool.

    Returns:
        The number of pages read.

    Raises:
        EngineError: the file is missing or damaged, or belongs to another model or an engine with other pages.
    """
    kind = dataclasses.replace(_KIND, check=lambda found: _check(found, device.cache, vocab_size))
    found: Prefixes = read_archive(path, kind, fingerprint)
    digests = [bytes.fromhex(digest) for digest in found.digests]
    new = [entry for entry, digest in enumerate(digests) if not pages.knows(digest)]
    contents = jax.tree.map(np.asarray, (found.keys, found.values))
    tokens = [row.tobytes() for row in np.asarray(found.tokens)]
    # The least recently used are left out, and the ends of texts before their beginnings.
    rest, taken = _last(new, len(pages.free))
    _, others = _last([entry for entry in rest if not store.has(digests[entry], tokens[entry])], store.free)
    numbers = pages.allocate(len(taken))
    device.put_pages(numbers, contents, taken)
    for page, entry in zip(numbers, taken, strict=True):
        pages.index(page, digests[entry], tokens[entry])
        pages.release([page])
    if others:
        rows = jax.tree.map(lambda array: array[others], contents)
        store.add([(digests[entry], tokens[entry]) for entry in others], rows)
    return len(taken) + len(others)


def _last(entries: list[int], count: int) -> tuple[list[int], list[int]]:
    """The entries before the last `count`, and these."""
    start = max(len(entries) - count, 0)
    return entries[:start], entries[start:]


def _check(found: Prefixes, cache: PagedCache, vocab_size: int) -> None:
    """Raises LlorchError unless the pages are of tokens of this vocabulary, and fit this cache and each other."""
    count = len(found.digests)
    if found.codec != cache.codec:
        raise EngineError(f"codec: expected {_codec(cache.codec)}, as in the engine, got {_codec(found.codec)}")
    _check_tokens(found.tokens, count, cache.page_size, vocab_size)
    for name, given, ours in (("keys", found.keys, cache.keys), ("values", found.values, cache.values)):
        _check_stored(name, given, ours, count)
    _check_digests(found.digests)


def _check_tokens(tokens: jax.Array, count: int, page_size: int, vocab_size: int) -> None:
    if tokens.ndim == 2 and tokens.shape[1] != page_size:
        raise EngineError(f"tokens: expected pages of {page_size} tokens, as in the engine, got {tokens.shape[1]}")
    if tokens.shape != (count, page_size) or tokens.dtype != jnp.int32:
        expected = f"int32 [{count}, {page_size}], a page for each digest"
        raise EngineError(f"tokens: expected {expected}, got {tokens.dtype} {list(tokens.shape)}")
    check_range("tokens", tokens, 0, vocab_size - 1)


def _check_stored(name: str, given: tuple[Stored, ...], ours: tuple[Stored, ...], count: int) -> None:
    """Checks that keys or values are as many pages as there are digests, each of the form of the engine's own."""
    if len(given) != len(ours):
        raise EngineError(f"{name}: expected {len(ours)} layers, as in the engine, got {len(given)}")
    for layer, (stored, own) in enumerate(zip(given, ours, strict=True)):
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(stored)):
            raise EngineError(f"{name}[{layer}]: expected arrays, got something else")
        expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), own)
        got = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
        if type(got) is not type(expected) or got != expected:  # a named tuple equals a plain one
            raise EngineError(f"{name}[{layer}]: expected {_brief(expected)}, as in the engine, got {_brief(got)}")


def _check_digests(digests: tuple[str, ...]) -> None:
    seen = set()
    for entry, digest in enumerate(digests):
        if not _DIGEST.fullmatch(digest):
            raise EngineError(f"digests[{entry}]: expected 32 hexadecimal digits in lower case, got {digest!r:.80}")
        if digest in seen:
            raise EngineError(f"digests[{entry}]: expected another digest for each page, got {digest} twice")
        seen.add(digest)


def _codec(codec: Any) -> str:
    return f"{codec.name!r:.40} for a head_dim of {codec.head_dim}"


def _brief(tree: Any) -> str:
    """Dtypes and shapes for a message."""
    arrays = ", ".join(f"{leaf.dtype} {list(leaf.shape)}" for leaf in jax.tree.leaves(tree))
    return arrays if isinstance(tree, jax.ShapeDtypeStruct) else f"{type(tree).__name__} of {arrays or 'nothing'}"
