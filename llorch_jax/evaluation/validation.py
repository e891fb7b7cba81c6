"""The twelve validation points: named intermediate values of a forward pass, and their comparison with a reference.

The points go through a model from the first layer norm to a greedy continuation, so that the first one that differs
tells which part is wrong.
"""

import dataclasses
import io
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llorch_jax.attention import MASKED, DenseView, allowed_slots, attention_scores
from llorch_jax.cache.placement import new_cache
from llorch_jax.cache.static import StaticCache
from llorch_jax.checks import check_append
from llorch_jax.config import GPT2Config
from llorch_jax.decoding.loop import decode_step, prefill
from llorch_jax.errors import CapacityError, ReferenceFileError, SamplerError
from llorch_jax.files import exists, read_bytes, read_json, shown
from llorch_jax.model import run
from llorch_jax.params import Params
from llorch_jax.sampling import Sampling, apply_temperature


@dataclasses.dataclass(frozen=True)
class Point:
    """One of the twelve validation points.

    Attributes:
        number: 1 .. 12.
        what: in words.
        keys: prefixes of the arrays that belong to it.
        tolerance: the largest absolute error allowed; 0 means equal.
    """

    number: int
    what: str
    keys: tuple[str, ...]
    tolerance: float


POINTS = (
    Point(1, "layer norm output", ("01_ln_1",), 1e-5),
    Point(2, "queries, keys, values", ("02_q", "02_k", "02_v"), 1e-4),
    Point(3, "K/V cache state", ("03_k_cache", "03_v_cache"), 1e-4),
    Point(4, "attention scores", ("04_allowed", "04_scores"), 1e-4),
    Point(5, "attention output", ("05_attn_out",), 1e-4),
    Point(6, "feed-forward output", ("06_mlp_out",), 1e-4),
    Point(7, "first block output", ("07_block_out",), 1e-4),
    Point(8, "full logits", ("08_logits",), 1e-3),
    Point(9, "last-position logits", ("09_last_logits",), 1e-3),
    Point(10, "argmax", ("10_argmax",), 0.0),
    Point(11, "softmax at a temperature", ("11_probabilities",), 1e-6),
    Point(12, "greedy continuation", ("12_greedy",), 0.0),
)
# How clear the reference's choices were, and what float32 made of it: not values to reproduce.
_NOT_COMPARED = ("12_greedy_gaps", "08_logits_float32_run")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a point compares: its largest absolute error, or what made it incomparable."""

    point: Point
    error: float
    passed: bool
    note: str = ""


def intermediates(
    params: Params, config: GPT2Config, tokens: Any, *, temperature: float = 0.8, new_tokens: int = 10
) -> dict[str, jax.Array]:
    """The values of all twelve validation points.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        tokens: int32 [B, T].
        temperature: of point 11, more than 0.
        new_tokens: length of the greedy continuation of point 12, 1 or more.

    Returns:
        Arrays by name; points 1, 2 and 4 .. 7 are the first block's.
        `01_ln_1` [B, T, D]; `02_q` [B, T, N, H]; `02_k`, `02_v` [B, T, K, H]; `03_k_cache_layerNN`,
        `03_v_cache_layerNN` [B, K, T, H] of every cache layer, after prefill of all tokens but the last and a decode
        step of the last; `04_allowed` bool, `04_scores` (masked ones at float32's lowest value) and
        `04_scores_unmasked` [B, N, T, T]; `05_attn_out` (after its projection), `06_mlp_out`, `07_block_out`
        [B, T, D]; `08_logits` [B, T, V]; `09_last_logits` [B, V]; `10_argmax` int32 [B]; `11_probabilities` [B, V];
        `12_greedy` int32 [B, new_tokens] and `12_greedy_gaps`, the largest minus the second largest logit per step.

    Raises:
        TokenError: the tokens are empty, misshapen, not integers, or outside the vocabulary.
        CapacityError: tokens and continuation do not fit the context, or the continuation is empty.
        SamplerError: the temperature is out of range.
    """
    if new_tokens < 1:
        raise CapacityError(f"new_tokens: expected 1 or more, got {new_tokens}")
    if temperature == 0:  # which means greedy decoding elsewhere, and has no softmax
        raise SamplerError(f"temperature: expected a number above 0, got {temperature}")
    divisor = Sampling.create(temperature).temperature
    tokens, _ = check_append(config, tokens, None, later=new_tokens - 1)
    values = _first_block(params, config, tokens)
    last = values["08_logits"][:, -1]
    values |= {
        "09_last_logits": last,
        "10_argmax": jnp.argmax(last, -1).astype(jnp.int32),
        "11_probabilities": jax.nn.softmax(apply_temperature(last, divisor), axis=-1),
    }
    return values | _decoded(params, config, tokens, new_tokens)


@partial(jax.jit, static_argnames="config")
def _first_block(params: Params, config: GPT2Config, tokens: jax.Array) -> dict[str, jax.Array]:
    """Points 1, 2 and 4 to 8."""
    seen: dict[str, jax.Array] = {}

    def probe(name: str, layer: int, value: jax.Array) -> None:
        if layer == 0:
            seen[name] = value

    logits = run(params, config, tokens, None, probe=probe).logits
    batch, count = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), tokens.shape)
    view = DenseView(seen["k"].transpose(0, 2, 1, 3), seen["v"].transpose(0, 2, 1, 3), positions[:1])
    scores = attention_scores(seen["q"], view.k, config.attention_scale(0))
    scores = scores.reshape(batch, config.n_head, count, count)
    allowed = jnp.broadcast_to(allowed_slots(positions, view, config.sliding_window), scores.shape)
    return {
        "01_ln_1": seen["ln_1"],
        "02_q": seen["q"],
        "02_k": seen["k"],
        "02_v": seen["v"],
        "04_allowed": allowed,
        "04_scores": jnp.where(allowed, scores, MASKED),
        "04_scores_unmasked": scores,
        "05_attn_out": seen["attn_out"],
        "06_mlp_out": seen["mlp_out"],
        "07_block_out": seen["block_out"],
        "08_logits": logits,
    }


def _decoded(params: Params, config: GPT2Config, tokens: jax.Array, new_tokens: int) -> dict[str, jax.Array]:
    """Points 3 and 12, by prefill and decode steps."""
    batch, count = tokens.shape
    cache = new_cache(params.mesh, StaticCache.init, config, batch_size=batch, capacity=count + new_tokens - 1)
    if count > 1:
        _, cache = prefill(params, config, tokens[:, :-1], cache)
    logits, cache = decode_step(params, config, tokens[:, -1], cache)
    values = {}
    for layer in range(config.cache_layers):
        view = cache.read(layer).dense()
        values[f"03_k_cache_layer{layer:02d}"] = view.k[:, :, :count]
        values[f"03_v_cache_layer{layer:02d}"] = view.v[:, :, :count]
    chosen, gaps = [], []
    for step in range(new_tokens):
        top = jax.lax.top_k(logits, 2)[0]
        gaps.append(top[:, 0] - top[:, 1])
        chosen.append(jnp.argmax(logits, -1).astype(jnp.int32))
        if step + 1 < new_tokens:
            logits, cache = decode_step(params, config, chosen[-1], cache)
    return values | {"12_greedy": jnp.stack(chosen, 1), "12_greedy_gaps": jnp.stack(gaps, 1)}


def load_reference(path: str | Path) -> tuple[dict[str, np.ndarray], float]:
    """Reference arrays from an `.npz` file, and the temperature of point 11.

    The file holds `tokens` int32 [B, T] and arrays named as `intermediates` names them. A JSON file of the same name
    beside it may state `parameters.temperature`; without it the temperature is 0.8.

    Raises:
        ReferenceFileError: the file is missing, is no `.npz`, or holds no tokens; or the JSON file is none.
    """
    path = Path(path)
    try:
        content = io.BytesIO(read_bytes(path, ReferenceFileError))
        with np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except ReferenceFileError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ReferenceFileError(
            f"{shown(path)}: expected a readable .npz file of reference arrays ({error})"
        ) from None
    if "tokens" not in arrays:
        raise ReferenceFileError(f"{path}: expected an array `tokens`, got {', '.join(sorted(arrays)) or 'none'}")
    sidecar = path.with_suffix(".json")
    try:
        about = read_json(sidecar, ReferenceFileError) if exists(sidecar, ReferenceFileError) else {}
        return arrays, float(about.get("parameters", {}).get("temperature", 0.8))
    except (ValueError, TypeError, AttributeError) as error:
        raise ReferenceFileError(
            f"{shown(sidecar)}: expected JSON with a number parameters.temperature ({error})"
        ) from None


def compare(captured: Mapping[str, Any], reference: Mapping[str, Any]) -> list[Verdict]:
    """A verdict for each of the twelve points. A point that the reference lacks, or lacks a part of, does not pass."""
    return [_compare_point(point, captured, reference) for point in POINTS]


def _compare_point(point: Point, captured: Mapping[str, Any], reference: Mapping[str, Any]) -> Verdict:
    names = [name for name in reference if name.startswith(point.keys) and name not in _NOT_COMPARED]
    lacking = [key for key in point.keys if not any(name.startswith(key) for name in names)]
    if lacking:
        return Verdict(point, float("nan"), False, f"{', '.join(lacking)}: not in the reference")
    worst = 0.0
    for name in sorted(names):
        if name not in captured:
            return Verdict(point, float("nan"), False, f"{name}: the model has none")
        ours, theirs = np.asarray(captured[name]), np.asarray(reference[name])
        if ours.shape != theirs.shape:
            return Verdict(point, float("nan"), False, f"{name}: expected shape {theirs.shape}, got {ours.shape}")
        worst = max(worst, _largest_error(ours, theirs))
    return Verdict(point, worst, bool(worst <= point.tolerance))


def _largest_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference; one that is no number, as with a NaN or of two infinities, counts as infinite."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return float(np.max(np.where(np.isnan(difference), np.inf, difference), initial=0.0))
