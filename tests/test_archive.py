"""Archives: every edit of a file is refused in one line, with the class that the kind of archive names."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from archives import edit
from flax import struct
from safetensors.numpy import save_file

from llorch_jax.archive import Kind, read_archive, write_archive
from llorch_jax.errors import CapacityError, LlorchError


class OwnError(LlorchError):
    """The class that a kind names."""


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Rule:
    count: int
    share: float = 0.5


@struct.dataclass
class Saved:
    arrays: tuple[jax.Array, ...]
    pairs: tuple[Pair, ...]
    keys: jax.Array
    more: dict[str, Any]
    rule: Rule = struct.field(pytree_node=False)
    limit: int = struct.field(pytree_node=False)
    flag: bool = struct.field(pytree_node=False)
    name: str | None = struct.field(pytree_node=False, default=None)


def check(saved):
    if saved.limit < 0:
        raise CapacityError(f"limit: expected 0 or more, got {saved.limit}")


KIND = Kind("thing", Saved, (Saved, Pair, Rule), OwnError, check)


def example():
    half = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    pair = Pair(jnp.array([True, False]), None)
    return Saved(
        (half, jnp.float32(2.5)), (pair,), jax.random.key(3), {"k": jnp.int32(1), "t": (1, "a")}, Rule(2), 7, True
    )


@pytest.fixture
def path(tmp_path):
    write_archive(tmp_path / "file", example(), KIND, "abc")
    return tmp_path / "file"


def refused(path, message, kind=KIND):
    with pytest.raises(OwnError, match=message) as caught:
        read_archive(path, kind, None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_values_come_back_bit_for_bit(path):
    again, value = read_archive(path, KIND, "abc"), example()
    assert jax.tree.structure(again) == jax.tree.structure(value)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(value), strict=True):
        if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
    assert (again.rule, again.limit, again.flag, again.name) == (Rule(2), 7, True, None)


def fields(about):
    return about["content"]["fields"]


def set_value(name, value):
    return lambda about, tensors: fields(about)[name].update(value=value)


def set_array(**changes):
    return lambda about, tensors: fields(about)["arrays"]["items"][0].update(changes)


EDITS = {
    "a number for a flag": (set_value("flag", 1), "Saved.flag: expected .*bool.*, got 1"),
    "a flag for a number": (set_value("limit", True), "Saved.limit: expected .*int.*, got True"),
    "a text for a number": (set_value("limit", "7"), "Saved.limit: expected .*int.*, got '7'"),
    "a fraction for a number": (set_value("limit", 7.5), "Saved.limit"),
    "a number for a text": (set_value("name", 7), "Saved.name: expected str | None, got 7"),
    "a number that the check refuses": (set_value("limit", -1), "limit: expected 0 or more, got -1"),
    "nothing for a number": (set_value("limit", None), "Saved.limit"),
    "a list for a number": (set_value("limit", [7]), "expected the description of a value"),
    "a number for an array": (lambda a, t: fields(a)["arrays"]["items"].append({"value": 1}), "Saved.arrays"),
    "an array for a tuple": (lambda a, t: fields(a).update(arrays=fields(a)["more"]["dict"]["k"]), "Saved.arrays"),
    "a tuple for an object": (lambda a, t: fields(a).update(rule={"tuple": "tuple", "items": []}), "Saved.rule"),
    "another object": (lambda a, t: fields(a).update(rule=fields(a)["pairs"]["items"][0]), "Saved.rule"),
    "an object of no known class": (
        lambda a, t: fields(a)["rule"].update(object="Path"),
        "expected one of Saved, Pair, Rule",
    ),
    "a field too few": (lambda a, t: fields(a).pop("limit") and None, "Saved: expected the fields arrays, pairs"),
    "a field too many": (lambda a, t: fields(a).update(extra={"value": 1}), "Saved: expected the fields"),
    "an item too few": (
        lambda a, t: fields(a)["pairs"]["items"][0]["items"].pop() and None,
        "Pair: expected 2 fields, got 1",
    ),
    "an item too many": (
        lambda a, t: fields(a)["pairs"]["items"][0]["items"].append({"value": None}),
        "Pair: expected 2 fields, got 3",
    ),
    "another shape": (set_array(shape=[3, 3]), r"expected the bytes of bfloat16 \[3, 3\], got 12"),
    "a negative shape": (set_array(shape=[-2, -3]), "expected a stored array"),
    "a shape of flags": (set_array(shape=[True, 6]), "expected a stored array"),
    "a huge shape": (set_array(shape=[2**62, 2**62]), "expected the bytes"),
    "another dtype": (set_array(dtype="float32"), r"expected the bytes of float32 \[2, 3\], got 12"),
    "a dtype of objects": (set_array(dtype="object"), "expected a stored array of a known dtype, got object"),
    "a dtype that JAX would narrow": (set_array(dtype="float64", shape=[1]), "expected a stored array"),
    "another tensor's name": (set_array(tensor="nowhere"), "expected a stored array"),
    "a flag that is neither": (
        lambda a, t: t.update({".pairs.0.0": np.array([1, 2], np.uint8)}),
        "expected false or true, got 2",
    ),
    "keys of an unknown kind": (lambda a, t: fields(a)["keys"].update(impl="dice"), "random keys, got those of dice"),
    "no keys": (
        lambda a, t: fields(a)["keys"].update(keys={"value": 3}),
        "random keys, got those of",
    ),
    "an unknown description": (lambda a, t: fields(a)["limit"].update(more=1), "expected the description of a value"),
    "no object": (lambda a, t: a.update(content={"value": 3}), "expected a thing, got 3"),
    "a list": (lambda a, t: a.update(content=[]), "expected the description of a value"),
    "another format": (lambda a, t: a.update(format="llorch_jax archive 2"), "expected the format"),
    "no content": (lambda a, t: a.pop("content") and None, "expected format, content and fingerprint"),
    "no JSON": (lambda a, t: "{", "this version"),
    "a JSON list": (lambda a, t: "[]", "expected the format"),
    "deep JSON": (lambda a, t: '{"format":' + "[" * 100_000, "nested too deeply"),
    "a deep description": (
        lambda a, t: a.update(content=json.loads('{"tuple":"tuple","items":[' * 300 + '{"value":1}' + "]}" * 300)),
        "expected a thing",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_file_with_the_right_checksum_is_refused(path, name):
    change, message = EDITS[name]
    edit(path, change)
    refused(path, message)


def test_damage_is_refused(path):
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        refused(path, "thing")


def test_another_kind_of_safetensors_file_is_refused_without_reading_it(tmp_path):
    save_file({"w": np.zeros((4, 4), jnp.bfloat16)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "expected a saved thing, got a safetensors file of another kind")


def test_another_model_is_refused(path):
    with pytest.raises(OwnError, match="thing of the model with fingerprint b, got one of abc"):
        read_archive(path, KIND, "b")


def test_paths_that_are_no_files_are_refused(path, tmp_path):
    for bad, message in ((tmp_path, "a directory"), (tmp_path / "no", "No such file"), (tmp_path / "\0", "this name")):
        refused(bad, message)
        with pytest.raises(OwnError, match=message if message != "No such file" else "a directory"):
            write_archive(tmp_path if message == "No such file" else bad, example(), KIND, "")


def test_what_cannot_be_saved_is_named(tmp_path):
    odd = example().replace(more={"k": object()})
    with pytest.raises(
        OwnError, match=r"^thing: expected arrays, numbers or one of .* to save as more\.k, got <object"
    ):
        write_archive(tmp_path / "file", odd, KIND, "")
    assert not list(tmp_path.iterdir())
