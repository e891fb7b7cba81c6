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
from llorch_jax.cache.paged.arrays import put_pages
from llorch_jax.engine.pages import PagePool
from llorch_jax.errors import EngineError

_DIGEST = re.compile("[0-9a-f]{32}")  # bytes.fromhex would also take spaces and capitals


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """The indexed pages of an engine, the least recently used first.

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


def save_prefixes(path: Path, cache: PagedCache, pages: PagePool, fingerprint: str) -> int:
    """Writes the indexed pages, and returns their number.

    Raises:
        EngineError: the file cannot be written.
    """
    entries = pages.entries()
    numbers = jnp.asarray(np.array([page for page, _, _ in entries], np.int32))
    codec = cache.codec
    assert isinstance(codec, FloatCodec | IntegerCodec)

    def taken(stored: Stored) -> Stored:
        return jax.tree.map(lambda pool: jnp.take(pool, numbers, axis=0), stored)

    tokens = [np.frombuffer(content, np.int32) for _, _, content in entries]
    found = Prefixes(
        codec=codec,
        keys=tuple(map(taken, cache.keys)),
        values=tuple(map(taken, cache.values)),
        tokens=jnp.asarray(np.array(tokens, np.int32).reshape(len(entries), pages.page_size)),
        digests=tuple(digest.hex() for _, digest, _ in entries),
    )
    write_archive(path, found, _KIND, fingerprint)
    return len(entries)


def load_prefixes(
    path: Path, cache: PagedCache, pages: PagePool, fingerprint: str, vocab_size: int
) -> tuple[PagedCache, int]:
    """Reads pages from a file into the cache, as many as there are free pages, and indexes them.

    Returns:
        The cache, and the number of pages read.

    Raises:
        EngineError: the file is missing or damaged, or belongs to another model or an engine with other pages.
    """
    kind = dataclasses.replace(_KIND, check=lambda found: _check(found, cache, vocab_size))
    found: Prefixes = read_archive(path, kind, fingerprint)
    digests = [bytes.fromhex(digest) for digest in found.digests]
    new = [entry for entry, digest in enumerate(digests) if not pages.knows(digest)]
    # The least recently used are left out, and the ends of texts before their beginnings.
    taken = np.array(new[max(len(new) - len(pages.free), 0) :], np.int32)
    if taken.size == 0:
        return cache, 0
    numbers = np.array(pages.allocate(taken.size), np.int32)
    keys, values = put_pages((cache.keys, cache.values), numbers, (found.keys, found.values), taken)
    tokens = np.asarray(found.tokens)
    for page, entry in zip(numbers.tolist(), taken.tolist(), strict=True):
        pages.index(page, digests[entry], tokens[entry].tobytes())
        pages.release([page])
    return cache.replace(keys=keys, values=values), int(taken.size)


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
