"""Models with quantized weights in every way of decoding, compared with float32 models of the same values."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from cache_cases import assert_close

import llorch_jax as lj
from llorch_jax.kernels import describe
from llorch_jax.linear import QuantizedMatrix

CONFIG = tiny.CONFIG
FLOAT = tiny.random_params(CONFIG)
PARAMS = lj.quantize(FLOAT, "int4")  # the token embedding is int8, in groups of 32
PROMPT = np.random.default_rng(0).integers(0, 256, (2, 9), np.int32)
LENGTHS = np.array([9, 5])
# The native kernels round each column of the activations to 16 bits; see docs/kernels.md. None is float32's own noise.
OF_CODES = None if describe().isa is None else 1e-3


@jax.jit
def dequantized(params):
    """The float32 parameters that quantized ones stand for."""

    def values(leaf):
        return leaf.dequantize() if isinstance(leaf, QuantizedMatrix) else leaf

    return jax.tree.map(values, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))


EXPECTED = dequantized(PARAMS)


@pytest.mark.parametrize("weights", ["int8", "int4", "float16", "bfloat16"])
def test_forward(weights):
    params = lj.quantize(FLOAT, weights)
    expected = lj.quantize(params, "float32") if "float" in weights else dequantized(params)
    logits = lj.forward(params, CONFIG, PROMPT)
    assert_close(logits, lj.forward(expected, CONFIG, PROMPT), None if "float" in weights else OF_CODES)
    assert np.abs(logits - lj.forward(FLOAT, CONFIG, PROMPT)).max() > 1e-4  # these are other weights


def test_w8a8_computes_what_its_twin_computes():
    """An exported program contains the twins."""
    params = lj.quantize(FLOAT, "w8a8")
    twin = jax.export.export(jax.jit(lambda *given: lj.forward(given[0], CONFIG, given[1])))(params, PROMPT)
    logits, int8 = (np.asarray(lj.forward(given, CONFIG, PROMPT)) for given in (params, lj.quantize(FLOAT, "int8")))
    scale = np.abs(logits).max()
    assert np.abs(logits - twin.call(params, PROMPT)).max() < 2e-3 * scale  # a code is rounded otherwise here or there
    assert 1e-3 * scale < np.abs(logits - int8).max() < 0.1 * scale


def test_an_output_projection_of_its_own():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    params = lj.quantize(tiny.random_params(config), "int8", 32)
    assert isinstance(params.lm_head, QuantizedMatrix)
    assert_close(lj.forward(params, config, PROMPT), lj.forward(dequantized(params), config, PROMPT))


@pytest.mark.parametrize("layout", ["static", "paged:32"])
def test_prefill_and_decode_step(layout):
    def logits(params):
        cache = lj.make_cache(CONFIG, layout, batch_size=2)
        first, cache = lj.prefill(params, CONFIG, PROMPT, cache, LENGTHS)
        second, _ = lj.decode_step(params, CONFIG, np.array([3, 4], np.int32), cache)
        return np.stack([first, second])

    assert_close(logits(PARAMS), logits(EXPECTED), OF_CODES)


WAYS = {
    "generate": lambda params: lj.generate_tokens(params, CONFIG, PROMPT, 12, None, LENGTHS)[0],
    "drawn": lambda params: lj.generate_tokens(
        params, CONFIG, PROMPT, 12, None, LENGTHS, lj.Sampling.create(), jax.random.key(1)
    )[0],
    "stream": lambda params: np.stack(list(lj.stream_tokens(params, CONFIG, PROMPT, 12, None, LENGTHS))),
    "session": lambda params: lj.Session.start(params, CONFIG, PROMPT).generate(params, CONFIG, 12)[0],
    "beams": lambda params: lj.beam_search(params, CONFIG, PROMPT, 6, num_beams=2).tokens,
    "contrastive": lambda params: lj.contrastive_search(params, CONFIG, PROMPT, 6)[0],
    "lookup": lambda params: lj.speculate_tokens(params, CONFIG, PROMPT, 12, lj.PromptLookup())[0],
    "draft": lambda params: lj.speculate_tokens(params, CONFIG, PROMPT, 12, lj.DraftModel(PARAMS, CONFIG))[0],
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens(way):
    np.testing.assert_array_equal(WAYS[way](PARAMS), WAYS[way](EXPECTED))


@pytest.mark.parametrize("way", ["generate", "stream", "session", "lookup", "draft"])
def test_tokens_with_rounded_activations(way):
    params = lj.quantize(FLOAT, "w8a8")
    lengths = np.full(2, PROMPT.shape[1]) if way in ("session", "lookup", "draft") else LENGTHS
    expected = [[*row[:length]] for row, length in zip(PROMPT, lengths, strict=True)]
    for _ in range(6):
        width = max(map(len, expected))
        padded = np.array([row + [0] * (width - len(row)) for row in expected], np.int32)
        logits = np.asarray(lj.forward(params, CONFIG, np.pad(padded, ((0, 0), (0, 15 - width)))))
        for number, row in enumerate(expected):
            row.append(int(logits[number, len(row) - 1].argmax()))
    got = WAYS[way](params)
    np.testing.assert_array_equal((got.T if way == "stream" else got)[:, :6], [row[-6:] for row in expected])


def test_texts():
    texts = []
    for params in (PARAMS, EXPECTED):
        model = lj.Model(CONFIG, params, tiny.byte_tokenizer(), "tiny")
        out = lj.generate(model, "ab", max_new_tokens=12)
        texts.append((out.text, round(lj.score(model, "some text").total, 3)))
    assert texts[0] == texts[1]


def test_fingerprints_tell_formats_apart():
    forms = [FLOAT, *(lj.quantize(FLOAT, *form) for form in (("int8",), ("w8a8",), ("int8", 32), ("int4",)))]
    assert len({lj.fingerprint(params, CONFIG) for params in forms}) == len(forms)
    assert lj.fingerprint(PARAMS, CONFIG) == lj.fingerprint(lj.quantize(FLOAT, "int4"), CONFIG)
