"""The command that writes the models of the reference data."""

import json

import pytest
import references
import synth

import llorch_jax as lj


def test_writes_the_model_of_a_sidecar(tmp_path, capsys):
    sidecar = references.FOLDER / "tiny-base.json"
    synth.main([str(sidecar), str(tmp_path / "model")])
    about = json.loads(sidecar.read_text())
    assert about["weights_sha256"] in capsys.readouterr().out
    model = lj.load(tmp_path / "model")
    assert model.config.n_embd == about["parameters"]["config"]["n_embd"]


def test_refuses_weights_that_are_not_those_of_the_sidecar(tmp_path):
    about = json.loads((references.FOLDER / "tiny-base.json").read_text())
    about["parameters"]["seed"] += 1
    (tmp_path / "about.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match="expected weights with sha256"):
        synth.main([str(tmp_path / "about.json"), str(tmp_path / "model")])
