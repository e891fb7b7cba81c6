"""The prefix cache on disk: pages and their tokens, in one file that is written atomically and checked when read."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.archive import Kind, read_archive, write_archive
from llorch_jax.cache.codecs import FloatCodec, IntegerCodec, Quantized, Stored
from llorch_jax.cache.paged import PagedCache
from llorch_jax.cache.paged.arrays import put_pages
from llorch_jax.engine.pages import PagePool
from llorch_jax.errors import EngineError


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
    write_archive(path, found, _kind(cache), fingerprint)
    return len(entries)


def load_prefixes(path: Path, cache: PagedCache, pages: PagePool, fingerprint: str) -> tuple[PagedCache, int]:
    """Reads pages from a file into the cache, as many as there are free pages, and indexes them.

    Returns:
        The cache, and the number of pages read.

    Raises:
        EngineError: the file is missing or damaged, or belongs to another model or an engine with other pages.
    """
    found: Prefixes = read_archive(path, _kind(cache), fingerprint)
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


def _kind(cache: PagedCache) -> Kind:
    """The kind of file that holds pages for this cache."""

    def check(found: Prefixes) -> None:
        count = len(found.digests)
        for name, given, ours in (("keys", found.keys, cache.keys), ("values", found.values, cache.values)):
            if found.codec != cache.codec or _form(given) != _form(ours):
                raise EngineError(
                    f"{name}: expected pages of {cache.page_size} tokens in {cache.codec.name}, as in the engine, "
                    f"got pages of {found.tokens.shape[-1]} in {found.codec.name}"
                )
            if any(leaf.shape[0] != count for leaf in jax.tree.leaves(given)):
                raise EngineError(f"{name}: expected {count} pages, one for each digest, got another number")
        if found.tokens.shape != (count, cache.page_size) or found.tokens.dtype != jnp.int32:
            raise EngineError(f"tokens: expected int32 [{count}, {cache.page_size}], got {list(found.tokens.shape)}")
        if len(set(found.digests)) != count or any(len(digest) != 32 for digest in found.digests):
            raise EngineError("digests: expected distinct digests of 32 digits, got others")

    return Kind("prefix cache", Prefixes, (Prefixes, FloatCodec, IntegerCodec, Quantized), EngineError, check)


def _form(stored: tuple[Stored, ...]) -> tuple[Any, ...]:
    """The structure of stored pages, and the shape and dtype of one page of each array."""
    return jax.tree.structure(stored), [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(stored)]
