"""The model against an independent implementation: transformers, in float64."""

import numpy as np
import pytest
import references
from profiles import THOROUGH, some

import llorch_jax as lj
from llorch_jax.evaluation.validation import POINTS, compare, load_reference

TINY = [
    "tiny-base",
    "tiny-gelu",
    "tiny-relu",
    "tiny-silu",
    "tiny-quick-gelu",
    "tiny-inner",
    "tiny-inverse-layer",
    "tiny-unscaled",
    "tiny-upcast",
    "tiny-untied",
    "tiny-epsilon",
    "tiny-odd-head",
]
BIGCODE = ["base", "inner", "odd-head", "untied"]
FLOORS = 4  # times the error that float32 arithmetic alone makes; another order of sums makes another error


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    about = references.sidecar("checkpoints-medium")
    parameters = about["parameters"]
    folder = tmp_path_factory.mktemp("medium")
    model = references.load_synthesised(parameters["config"], parameters["seed"], about["weights_sha256"], folder)
    (folder / "model.safetensors").unlink()
    arrays, temperature = load_reference(references.FOLDER / "checkpoints-medium.npz")
    captured = lj.intermediates(
        model.params, model.config, arrays["tokens"], temperature=temperature, new_tokens=parameters["new_tokens"]
    )
    return captured, arrays, about["float32_floor"]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.number:02d}")
def test_validation_point(medium, point):
    captured, arrays, _ = medium
    verdict = compare(captured, arrays)[point.number - 1]
    assert verdict.passed, verdict


def test_medium_logits_stand_within_twice_the_float32_floor(medium):
    captured, arrays, floor = medium
    error = np.abs(np.asarray(captured["08_logits"], np.float64) - arrays["08_logits"]).max()
    assert error <= 2 * floor["08_logits"]["max_abs_error"]


# In `make test` two models take pieces of the text into a cache, too: how the others differ does not reach the cache.
IN_PIECES = [*TINY, *BIGCODE] if THOROUGH else ["tiny-base", "odd-head"]


@pytest.mark.parametrize("name", TINY)
def test_gpt2_variant(name, tmp_path):
    about = references.sidecar(name)
    parameters = about["parameters"]
    model = references.load_synthesised(parameters["config"], parameters["seed"], about["weights_sha256"], tmp_path)
    check_tiny(model, references.arrays(name), about["float32_floor"], name in IN_PIECES)


@pytest.mark.parametrize("variant", BIGCODE)
def test_gpt_bigcode_variant(variant, tmp_path):
    about = references.sidecar("bigcode-tiny")
    parameters = about["parameters"]
    config, digest = parameters["configs"][variant], about["weights_sha256"][variant]
    model = references.load_synthesised(config, parameters["seed"], digest, tmp_path)
    assert model.config.kv_heads == 1
    prefix = f"{variant}."
    data = {k.removeprefix(prefix): v for k, v in references.arrays("bigcode-tiny").items() if k.startswith(prefix)}
    check_tiny(model, data, about["float32_floor"][variant], variant in IN_PIECES)


def check_tiny(model, data, floor, in_pieces):
    """Full and ragged logits, uncached and cached, and the greedy continuation of the ragged rows."""
    params, config = model.params, model.config
    atol = FLOORS * max(value["max_abs_error"] for key, value in floor.items() if "logits" in key)
    np.testing.assert_allclose(lj.forward(params, config, data["tokens"]), data["logits"], rtol=0, atol=atol)

    cache = lj.StaticCache.init(config, batch_size=3, capacity=50)
    if in_pieces:
        pieces = []
        for piece in np.split(data["tokens"], [7, 8], axis=1):
            logits, cache = lj.forward(params, config, piece, cache=cache)
            pieces.append(logits)
        np.testing.assert_allclose(np.concatenate(pieces, 1), data["logits"], rtol=0, atol=atol)

    tokens, lengths = references.right_padded(data)
    logits, cache = lj.prefill(params, config, tokens, cache.clear(), lengths)
    np.testing.assert_allclose(logits, data["ragged_logits"][:, -1], rtol=0, atol=atol)
    count = data["greedy"].shape[1]
    generated, _ = lj.generate_tokens(params, config, tokens, count, cache.clear(), lengths)
    np.testing.assert_array_equal(generated, data["greedy"])


def test_sliding_window(tmp_path):
    about = references.sidecar("window")
    parameters, data = about["parameters"], references.arrays("window")
    model = references.load_synthesised(parameters["config"], parameters["seed"], about["weights_sha256"], tmp_path)
    config = lj.GPT2Config.from_hf_dict({**parameters["config"], "sliding_window": parameters["window"]})
    atol = FLOORS * about["float32_floor"]["window_logits"]["max_abs_error"]
    logits = lj.forward(model.params, config, data["tokens"])
    np.testing.assert_allclose(logits, data["window_logits"], rtol=0, atol=atol)
    assert np.abs(logits - data["full_logits"]).max() > 100 * atol


@pytest.mark.parametrize("length", some([7, 1, 64, 300], 2))
def test_gpt2_small_greedy(small, length):
    model, data, about = small
    prompt = data[f"prompt_{length}"]
    cache = lj.StaticCache.init(model.config, batch_size=1, capacity=512)
    logits, _ = lj.prefill(model.params, model.config, prompt, cache)
    floor = about["float32_floor"][f"last_logits_{length}"]["max_abs_error"]
    np.testing.assert_allclose(logits, data[f"last_logits_{length}"], rtol=0, atol=FLOORS * floor)
    tokens, _ = lj.generate_tokens(model.params, model.config, prompt, 32)
    np.testing.assert_array_equal(tokens, data[f"greedy_{length}"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    about = references.sidecar("small-greedy")
    parameters = about["parameters"]
    folder = tmp_path_factory.mktemp("small")
    model = references.load_synthesised(parameters["config"], parameters["seed"], about["weights_sha256"], folder)
    (folder / "model.safetensors").unlink()
    return model, references.arrays("small-greedy"), about
