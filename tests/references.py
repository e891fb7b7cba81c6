"""Models and arrays of the reference data: weights are rebuilt by `synth`, results are transformers'."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import synth

import llorch_jax as lj

FOLDER = Path(__file__).parent / "reference"


def sidecar(name: str) -> dict[str, Any]:
    """What the JSON file beside the arrays says."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def arrays(name: str) -> dict[str, np.ndarray]:
    """The reference arrays."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def load_synthesised(config: dict, seed: int, digest: str, folder: Path) -> lj.Model:
    """The model that `lj.load` reads from the files that `synth` writes, after checking that the weights are right."""
    weights = synth.synth(config, seed)
    assert synth.digest(weights) == digest, "NumPy's stream of normals has changed: the reference weights are not these"
    synth.write(config, weights, folder)
    del weights
    return lj.load(folder)


def right_padded(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The left-padded ragged rows of a tiny reference as right-padded tokens [B, T], and their lengths [B]."""
    lengths = data["ragged_lengths"]
    tokens = np.zeros_like(data["ragged_tokens"])
    for row, length in enumerate(lengths):
        tokens[row, :length] = data["ragged_tokens"][row, -length:]
    return tokens, lengths
