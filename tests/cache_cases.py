"""Random tiny models, ragged token batches and append splits for the tests of the caches.

Every new shape is compiled anew. Models therefore come from a small pool, batches have 1 or 3 rows, all batches are
padded to `COLUMNS` tokens and chunks to one of `WIDTHS`; what is random is all that is not a shape.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import strategies as st

from llorch_jax.cache.layouts import LAYOUTS
from llorch_jax.config import GPT2Config
from llorch_jax.decoding import loop as decoding
from llorch_jax.decoding import steps
from llorch_jax.model import forward, run
from llorch_jax.params import Params, param_shapes

VOCAB, POSITIONS = 97, 64
# A specification of every layout in the registry, small enough for rows of `COLUMNS` tokens to fill or overfill it.
LAYOUT_SPECS = {
    "static": "static",
    "dynamic": "dynamic",
    "rotating": "rotating:8+2",
    "paged": "paged:8",
    "int8": "int8",
    "int4": "int4",
    "recent": "recent:9",
    "sinks": "sinks:9",
    "h2o": "h2o:9",
    "snapkv": "snapkv:9",
}
assert LAYOUT_SPECS.keys() == LAYOUTS.keys(), "a new layout needs a specification here, and with it all property tests"
COLUMNS = 24  # tokens of the longest row
WIDTHS = (1, 5, 16)  # tokens per row in one append, padding included
BATCHES = (1, 3)


def make_config(*, layers=2, heads=2, kv_heads=None, head_dim=4, **fields) -> GPT2Config:
    """A tiny model's hyperparameters."""
    return GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=heads * head_dim,
        n_layer=layers,
        n_head=heads,
        num_kv_heads=kv_heads,
        n_inner=16,
        **fields,
    )


CONFIGS = (
    make_config(layers=2, heads=4, head_dim=8),
    make_config(layers=1, heads=1, head_dim=16),
    make_config(layers=2, heads=6, kv_heads=1, head_dim=5),
    make_config(layers=2, heads=6, kv_heads=3, head_dim=7),
    make_config(layers=3, heads=4, kv_heads=2, head_dim=3, tie_word_embeddings=False),
    make_config(layers=3, heads=2, head_dim=9, kv_sharing=(0, 0, 2)),
    make_config(layers=2, heads=3, head_dim=11, sliding_window=6, scale_attn_by_inverse_layer_idx=True),
)


def configs(pool=CONFIGS):
    """One model of the pool, the plainest first."""
    return st.sampled_from(pool)


@st.composite
def any_configs(draw) -> GPT2Config:
    """Any tiny model. Each is compiled anew: take few examples."""
    heads = draw(st.integers(1, 6))
    layers = draw(st.integers(1, 3))
    sharing = draw(st.sampled_from([None, (0, 0, 2)[:layers], (0, 1, 0)[:layers]]))
    return make_config(
        layers=layers,
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0])),
        head_dim=draw(st.integers(3, 16)),
        sliding_window=draw(st.sampled_from([None, None, 5])),
        kv_sharing=sharing,
    )


@functools.cache
def make_params(config: GPT2Config, seed: int = 0) -> Params:
    """Parameters with the scales of `synth`: attention is far from uniform and logits are about 1.5 in size."""
    generator = np.random.default_rng(seed)
    paths, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    return tree.unflatten(_draw(generator, jax.tree_util.keystr(path), leaf.shape) for path, leaf in paths)


def _draw(generator, path: str, shape: tuple[int, ...]) -> jax.Array:
    if len(shape) == 1:
        mean, std = (1.0, 0.2) if path.endswith(".weight") else (0.0, 0.1)
    else:
        gain = {".wte": 1.5, ".lm_head": 1.5, ".wpe": 2.0}.get(path, 2.0 if ".qkv" in path else 1.2)
        mean, std = 0.0, gain / shape[1] ** 0.5
    return jnp.asarray((mean + std * generator.standard_normal(shape)).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Batch:
    """A right-padded ragged batch: tokens int32 [B, COLUMNS] (padding has random ids too) and lengths int32 [B]."""

    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def size(self) -> int:
        return len(self.lengths)

    def row(self, row: int) -> "Batch":
        """One row alone."""
        return Batch(self.tokens[row : row + 1], self.lengths[row : row + 1])


def make_batch(lengths, seed: int = 0, columns: int = COLUMNS) -> Batch:
    """Random tokens in rows of these lengths."""
    lengths = np.asarray(lengths, np.int32)
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (len(lengths), columns), np.int32)
    return Batch(tokens, lengths)


@st.composite
def batches(draw, sizes=BATCHES, shortest: int = 1, longest: int = COLUMNS) -> Batch:
    """A ragged batch."""
    size = draw(st.sampled_from(sizes))
    lengths = draw(st.lists(st.integers(shortest, longest), min_size=size, max_size=size))
    return make_batch(lengths, draw(st.integers(0, 99)), max(longest, COLUMNS))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One append: `width` tokens per row, of which the first `count` int32 [B] are real."""

    width: int
    count: np.ndarray


def in_chunks(lengths, width: int) -> list[Chunk]:
    """As few chunks of one width as hold rows of these lengths."""
    lengths = np.asarray(lengths, np.int32)
    firsts = range(0, int(lengths.max(initial=0)), width)
    return [Chunk(width, np.clip(lengths - first, 0, width)) for first in firsts]


@st.composite
def splits(draw, lengths, widths=WIDTHS, most: int = 6) -> list[Chunk]:
    """Chunks that together hold rows of these lengths; a row's part of a chunk may be anything, nothing included."""
    left = np.array(lengths, np.int32)
    chunks = []
    while left.any() and len(chunks) < most:
        width = draw(st.sampled_from(widths))
        count = np.minimum(left, width)
        if draw(st.booleans()):
            count = np.array([draw(st.integers(0, int(n))) for n in count], np.int32)
        chunks.append(Chunk(width, count))
        left = left - count
    return chunks + in_chunks(left, max(widths))


def append(params, config, tokens, cache, count):
    """Logits float32 [B, T, V] of tokens [B, T], of which `count` [B] per row are real, and the cache with them."""
    out = run(params, config, tokens, cache, count)
    return out.logits, out.cache


append_shared = jax.jit(append, static_argnames="config")
append_owned = jax.jit(append, static_argnames="config", donate_argnames="cache")


def feed(config: GPT2Config, cache, batch: Batch, chunks, *, seed: int = 0, step=append_shared, start=None):
    """Appends a batch to a cache chunk by chunk, each reserved on the host first.

    Args:
        config: of the model whose parameters are `make_params(config, seed)`.
        cache: of the batch's size.
        batch: what to append.
        chunks: how; their counts must not exceed the rows' lengths. Padding gets random ids.
        seed: of the parameters.
        step: `append`, jitted and sharing (`append_shared`), jitted and owning (`append_owned`), or plain.
        start: int [B], which token of each row is appended first; 0 by default.

    Returns:
        Logits float32 [B, columns of the batch, V], NaN where nothing was appended, and the cache.
    """
    params = make_params(config, seed)
    logits = np.full((*batch.tokens.shape, VOCAB), np.nan, np.float32)
    done = np.zeros(batch.size, np.int32) if start is None else np.array(start, np.int32)
    for chunk in chunks:
        tokens = make_batch(chunk.count, int(done.sum()), chunk.width).tokens  # padding is random
        for row, (first, count) in enumerate(zip(done, chunk.count, strict=True)):
            tokens[row, :count] = batch.tokens[row, first : first + count]
        count = jnp.asarray(chunk.count, jnp.int32)
        out, cache = step(params, config, jnp.asarray(tokens), cache.reserve(count), count)
        out = np.asarray(out)
        for row, (first, count) in enumerate(zip(done, chunk.count, strict=True)):
            logits[row, first : first + count] = out[row, :count]
        done = done + chunk.count
    return logits, cache


def feed_prefill(config: GPT2Config, cache, batch: Batch, chunks, *, seed: int = 0):
    """Like `feed`, through `decoding.prefill`, with at least one token per row and chunk.

    Returns:
        Logits float32 [B, V] of each row's last token, and the cache.
    """
    done, logits = np.zeros(batch.size, np.int32), None
    for chunk in chunks:
        columns = np.minimum(done[:, None] + np.arange(chunk.width), batch.tokens.shape[1] - 1)
        tokens = np.take_along_axis(batch.tokens, columns, axis=1)
        logits, cache = decoding.prefill(make_params(config, seed), config, tokens, cache, chunk.count)
        done = done + chunk.count
    return logits, cache


def uncached(config: GPT2Config, batch: Batch, seed: int = 0) -> np.ndarray:
    """Logits float32 [B, columns, V] of the forward pass without a cache, NaN behind the rows' ends."""
    logits = np.array(forward(make_params(config, seed), config, batch.tokens))
    logits[np.arange(logits.shape[1]) >= batch.lengths[:, None]] = np.nan
    return logits


def rms(logits) -> float:
    """Root mean square of what is not NaN."""
    return float(np.sqrt(np.nanmean(np.square(np.asarray(logits, np.float32)))))


def relative_error(got, expected, scale: float | None = None) -> float:
    """The largest difference over `scale`, by default the root mean square of what is expected.

    NaN must stand in the same places. Where few logits are compared, take the scale from more of them.
    """
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    assert got.shape == expected.shape, f"shape: expected {expected.shape}, got {got.shape}"
    known = ~np.isnan(expected)
    assert np.array_equal(known, ~np.isnan(got)), "logits: NaN in other places than expected"
    if not known.any():
        return 0.0
    return float(np.max(np.abs(got - expected)[known])) / (rms(expected) if scale is None else scale)


@functools.cache
def float32_tolerance() -> float:
    """How far apart two float32 computations of the same logits may be, relative to their root mean square.

    Rounding takes each of them away from the exact logits by what is measured here, in the worst model of the pool, so
    two of them are at most twice as far apart. As much again is left for tokens that were not measured. It comes to a
    few times 1e-5; a wrong mask, slot or position shows as more than 1e-3.
    """
    return 4 * max(oracle.noise(make_params(config), config) for config in CONFIGS)


def assert_close(got, expected, tolerance: float | None = None, scale: float | None = None) -> None:
    """Fails where `relative_error` is beyond the tolerance, by default that of float32."""
    error = relative_error(got, expected, scale)
    tolerance = float32_tolerance() if tolerance is None else tolerance
    assert error <= tolerance, f"relative error: expected at most {tolerance:g}, got {error:g}"


_HLO_TYPES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "int8": "s8",
    "uint8": "u8",
    "int32": "s32",
    "uint16": "u16",
}


def buffers(cache) -> list[jax.Array]:
    """The arrays of a cache that have three or more axes, and so hold keys, values or what belongs to them."""
    return [leaf for leaf in jax.tree.leaves(cache) if leaf.ndim >= 3]


def pointers(cache) -> list[int]:
    """Where the buffers lie in memory."""
    return [leaf.unsafe_buffer_pointer() for leaf in buffers(cache)]


def decode_copies(config: GPT2Config, cache) -> list[str]:
    """The instructions of the compiled decode step that copy an array of the shape of one of the cache's buffers."""
    token = jnp.zeros(cache.batch_size, jnp.int32)
    lowered = steps.decode.lower(make_params(config), config, token, cache)
    shapes = {f"{_HLO_TYPES[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]" for leaf in buffers(cache)}
    copy = re.compile(r"= (\w+\[[\d,]*\])\S* copy(-start)?\(")
    return [
        line.strip()
        for line in lowered.compile().as_text().splitlines()
        if (found := copy.search(line)) and found[1] in shapes
    ]
