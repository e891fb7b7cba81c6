"""Constrained generation: what comes is valid, whatever the model would rather say."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

import llorch_jax as lj
from llorch_jax.sampling.masking import Masked, unpack_mask
from llorch_jax.text.constrained.constraint import Constraint

llguidance_numpy = pytest.importorskip("llguidance.numpy", reason="needs the extra `constrained`")

from llorch_jax.text.constrained.matching import compiler_of  # noqa: E402

TOKENIZER = tiny.byte_tokenizer()
EOS = tiny.END_OF_TEXT
RECITING = tiny.reciting_model("one two three")

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 12}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["street", "zip"],
    "additionalProperties": False,
}
PERSON = {
    "$defs": {"address": ADDRESS},
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "home": {"$ref": "#/$defs/address"},
        "work": {"anyOf": [{"$ref": "#/$defs/address"}, {"type": "null"}]},
        "role": {"enum": ["König", 'the "fool"', 3, None]},
    },
    "required": ["name", "age", "home", "work", "role"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number", "minimum": -5, "maximum": 5, "multipleOf": 0.5},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
ESCAPES = {"type": "array", "items": {"type": "string", "pattern": '^["\\\\\n\t]{2,4}$'}, "minItems": 2, "maxItems": 3}


def is_address(value):
    return (
        set(value) == {"street", "zip"} and len(value["street"]) <= 12 and bool(re.fullmatch("[0-9]{5}", value["zip"]))
    )


def is_person(text):
    value = json.loads(text)
    assert list(value) == ["name", "age", "home", "work", "role"]
    assert 1 <= len(value["name"]) <= 16
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 120
    assert is_address(value["home"])
    assert value["work"] is None or is_address(value["work"])
    return value["role"] in ("König", 'the "fool"', 3, None)


def is_tree(text, value=None):
    value = json.loads(text) if value is None else value
    assert set(value) <= {"value", "children"}
    assert -5 <= value["value"] <= 5
    assert (2 * value["value"]) % 1 == 0
    children = value.get("children", [])
    return len(children) <= 1 and all(is_tree("", child) for child in children)


def is_escaped(text):
    value = json.loads(text)
    return 2 <= len(value) <= 3 and all(re.fullmatch('["\\\\\n\t]{2,4}', each) for each in value)


WORDS = ["yes", "yesterday", "no", "nein!", "näh", 'quote "this"', "a\\b", "🙂"]
MAIL = r"([0-9]{1,3}\.){3}[0-9]{1,3}|[a-z]{2,8}@[a-z]{1,9}\.(com|org)"
LARK = 'start: line{1,3}\nline: NAME " = " NUMBER ";"\nNAME: /[a-z]{1,4}/\nNUMBER: /[0-9]{1,3}/'
GBNF = 'root ::= "<" item ("," item){1,2} ">"\nitem ::= [a-f]{1,3} | "(" [0-9] ")"'
CASES = [
    (Constraint.json_schema(PERSON), is_person),
    (Constraint.json_schema(json.dumps(TREE)), is_tree),
    (Constraint.json_schema(ESCAPES), is_escaped),
    (Constraint.regex(MAIL), re.compile(MAIL).fullmatch),
    (Constraint.choices(WORDS), WORDS.__contains__),
    (Constraint.grammar(LARK), re.compile("([a-z]{1,4} = [0-9]{1,3};){1,3}").fullmatch),
    (Constraint.grammar(GBNF), re.compile(r"<([a-f]{1,3}|\([0-9]\))(,([a-f]{1,3}|\([0-9]\))){1,2}>").fullmatch),
]


def test_texts_of_the_demo_model_are_valid_each_row_by_its_own_constraint():
    model = lj.load("demo")
    prompts = ["The king said: "] * len(CASES)
    for seed in range(3):
        outs = lj.generate(
            model, prompts, 160, temperature=1.5, seed=seed, constraint=[constraint for constraint, _ in CASES]
        )
        for out, (constraint, valid) in zip(outs, CASES, strict=True):
            assert out.finish_reason == "stop", (constraint, out.text)
            assert valid(out.text), (constraint, out.text)
            assert model.tokenizer.decode(out.token_ids, skip_special_tokens=True) == out.text
    first = CASES[0][0]
    alone = lj.generate(model, prompts[0], 160, temperature=1.5, seed=2, constraint=first)
    pieces = list(lj.stream(model, prompts[0], 160, temperature=1.5, seed=2, json_schema=PERSON))
    assert alone.token_ids == outs[0].token_ids == [piece.token_id for piece in pieces]
    assert "".join(piece.text for piece in pieces) == alone.text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


@examples(40)
@given(st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=5, unique=True), st.integers(0, 5))
def test_masks_name_exactly_what_some_choice_goes_on_with(texts, number):
    """Beside a plain twin: over a vocabulary of bytes, the bytes that continue a choice, and the end behind one."""
    matcher = compiler_of(TOKENIZER, 300, (EOS,)).matcher(Constraint.choices(texts), (EOS,))
    choices = [TOKENIZER.encode(text) for text in texts]
    target = choices[number % len(choices)]
    mask = np.zeros((2, 10), np.int32)
    for count in range(len(target) + 1):
        longer = [ids for ids in choices if ids[:count] == target[:count] and len(ids) > count]
        expected = {ids[count] for ids in longer} | ({EOS} if target[:count] in choices else set())
        assert matcher.fill(mask, 1) == bool(longer)
        if longer:
            allowed = np.asarray(unpack_mask(jnp.asarray(mask), 300))[1]
            assert set(np.flatnonzero(allowed).tolist()) == expected
        if count < len(target):
            goes_on = matcher.push(target[count])
            assert goes_on or target[: count + 1] in choices
    assert not mask[0].any()


def test_all_bits_of_a_word_of_the_mask_are_counted():
    described = json.loads(TOKENIZER.to_json())  # its ids, with the end-of-text id as the first
    described["model"]["vocab"] = {token: (id + 1) % 257 for token, id in described["model"]["vocab"].items()}
    described["added_tokens"][0]["id"] = 0
    tokenizer = lj.Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(described)))
    mask = np.zeros((1, 9), np.int32)
    compiler_of(tokenizer, 257, (0,)).matcher(Constraint.regex("[!-?]*"), (0,)).fill(mask, 0)
    assert mask.tolist() == [[-1, *[0] * 8]]  # which as a number has one bit


def test_the_mask_is_applied_as_llguidance_applies_it_and_before_the_samplers_settings():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 300)).astype(np.float32)
    mask = rng.integers(-(2**31), 2**31, (4, 10)).astype(np.int32)
    masked = logits.copy()
    llguidance_numpy.apply_token_bitmask_inplace(masked, mask)
    keys = jax.random.split(jax.random.key(0), 4)
    no_ids = jnp.zeros((4, 0), jnp.int32)

    def sample(sampler, logits):
        return sampler.sample(jnp.asarray(logits), keys, None, no_ids, sampler.init(4))[0]

    for inner in (lj.Greedy(), lj.Sampling.create(0.7, top_k=5)):
        assert np.array_equal(sample(Masked(inner, jnp.asarray(mask)), logits), sample(inner, masked))
    forbidden = int(np.flatnonzero(np.isinf(masked[0]))[0])
    biased = Masked(lj.Sampling.create(logit_bias={forbidden: 1e9}), jnp.asarray(mask))
    assert np.isfinite(masked[np.arange(4), sample(biased, logits)]).all()


class TestEnds:
    """With a model that says "ne two three" and then ends."""

    def text(self, **settings):
        out = lj.generate(RECITING, "o", 20, **settings)
        pieces = list(lj.stream(RECITING, "o", 20, **settings))
        assert "".join(piece.text for piece in pieces) == out.text
        assert [piece.token_id for piece in pieces] == out.token_ids
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (out.finish_reason, out.stop_reason)
        return out.text, out.finish_reason, out.stop_reason

    def test_where_the_constraint_allows_nothing_more(self):
        assert self.text(regex="ne( two)?") == ("ne two", "stop", None)

    def test_where_the_model_ends_and_the_constraint_allows_it(self):
        assert self.text(regex="[a-z ]+") == ("ne two three", "stop", EOS)
        assert self.text(regex="ne two three[!?]")[0][:-1] == "ne two three"

    def test_at_the_number_of_tokens(self):
        assert self.text(regex="[a-z ]{30}")[1:] == ("length", None)

    def test_at_a_stop_id_only_where_the_text_may_end(self):
        space = TOKENIZER.encode(" ")[0]
        assert self.text(regex="[a-z ]+", stop_ids=[space]) == ("ne", "stop", space)
        text, reason, _ = self.text(regex="[a-z ]{5}", stop_ids=[space])
        assert (len(text), " " in text, reason) == (5, False, "stop")
        with pytest.raises(lj.ConstraintError, match="none in the vocabulary"):
            lj.generate(RECITING, "o", 20, regex="ne two", stop_ids=[space])

    def test_whatever_the_samplers_settings_want(self):
        settings = {"min_new_tokens": 9, "forced_tokens": TOKENIZER.encode("xyz")}
        assert self.text(regex="ne( two)?", **settings)[1] == "stop"
        assert re.fullmatch("ne( two)?", self.text(regex="ne( two)?", **settings)[0])

    def test_what_the_model_says_anyway_has_the_same_log_probabilities(self):
        plain = lj.generate(RECITING, "o", 20, top_logprobs=2)
        out = lj.generate(RECITING, "o", 20, top_logprobs=2, regex="[a-z ]+")
        assert out.token_ids == plain.token_ids
        assert out.logprobs == pytest.approx(plain.logprobs, abs=1e-5)
        assert [[id for id, _ in top] for top in out.top_logprobs] == [
            [id for id, _ in top] for top in plain.top_logprobs
        ]


def test_other_rows_growing_caches_and_reencoding_change_nothing():
    model = tiny.random_model(eos_token_id=EOS, n_layer=1, n_positions=24)
    prompts, settings, pattern = ["ab", "abc"], {"temperature": 1.0, "seed": 3}, "[x-z]{2}(-[0-9]{3}){3}"
    alternating = "([0-9][a-z]){20}"
    rows = [Constraint.regex(pattern), None]
    out = lj.generate(model, prompts, 20, constraint=rows, cache="dynamic", **settings)
    assert re.fullmatch(pattern, out[0].text)
    assert out[1].token_ids == lj.generate(model, prompts, 20, **settings)[1].token_ids
    for each in lj.generate(model, prompts, 50, regex=alternating, overflow="reencode", cache="dynamic", **settings):
        assert re.fullmatch(alternating, each.text)
        assert each.finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"regex": r"(?=a)b"}, "regex: .*look-around"),
        ({"regex": "a?", "grammar": "start: /a/"}, "expected one of .*got regex and grammar"),
        ({"regex": b"a"}, "regex: expected a str"),
        ({"regex": "\ud800"}, "UTF-8"),
        ({"regex": ""}, "regex: expected one that some text"),
        ({"regex": r"[^\s\S]"}, r"regex: expected one that some text matches, got"),
        ({"grammar": 'root ::= root "a"'}, "grammar: expected one that some text matches, got 'root"),
        ({"json_schema": {"$ref": "#"}}, "json_schema: expected one that some text matches, got"),
        (
            {"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}},
            "json_schema: Unsatisfiable schema: minL",
        ),
        ({"json_schema": "{'a': 1}"}, "json_schema: expected the JSON of an object"),
        ({"json_schema": {"type": "text"}}, "json_schema: Invalid type: text"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, 'json_schema: .*"uniqueItems"'),
        ({"json_schema": {"const": {1, 2}}}, "json_schema: expected values that JSON has"),
        ({"json_schema": "[" * 100_000}, "json_schema: expected the JSON of an object"),
        ({"json_schema": 5}, "json_schema: expected a mapping or a str, got 5"),
        ({"grammar": "start: noun"}, "grammar: .*noun"),
        ({"grammar": "root ::= ("}, "grammar: .*GBNF"),
        ({"choices": "yes"}, "choices: expected one text or more, got 'yes'"),
        ({"choices": ["yes", ""]}, "choices: expected texts of one character"),
        ({"choices": ["yes", 1]}, "choices: expected texts, got 1"),
        ({"constraint": "a+"}, r"constraint: expected a Constraint or a list of them, got 'a\+'"),
        ({"constraint": [None, None]}, "constraint: expected one per prompt, 1, got 2"),
        ({"constraint": ["a"]}, "constraint 0: expected a Constraint or None, got 'a'"),
    ],
)
def test_bad_constraints_are_named(settings, message):
    for run in (lj.generate, lj.stream):
        with pytest.raises(lj.ConstraintError, match=message) as error:
            run(RECITING, "o", 5, **settings)
        assert "\n" not in str(error.value)
        assert "<state>" not in str(error.value)
        assert len(str(error.value)) < 350


def test_a_schema_that_is_nested_too_deeply_is_refused():
    schema = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(lj.ConstraintError, match="json_schema: expected a schema that is nested less deeply"):
        lj.generate(RECITING, "o", 5, json_schema=schema)


def test_stop_strings_are_refused():
    with pytest.raises(lj.OptionError, match="stop: expected none with constrained generation"):
        lj.generate(RECITING, "o", 5, regex="a+", stop="b")


def test_no_half_character_at_the_limit():
    pattern = "é{2,4}"
    for count, text in ((1, ""), (2, "é"), (3, "é"), (4, "éé")):
        out = lj.generate(RECITING, "o", count, regex=pattern)
        pieces = list(lj.stream(RECITING, "o", count, regex=pattern))
        assert (out.text, out.finish_reason, len(out.token_ids)) == (text, "length", count)
        assert "".join(piece.text for piece in pieces) == text


def test_what_a_constraint_needs(monkeypatch):
    with pytest.raises(lj.ConstraintError, match="expected at least the 257 tokens of the tokenizer, got 200"):
        compiler_of(TOKENIZER, 200, (EOS,))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(lj.ConstraintError, match=r"pip install 'llorch-jax\[constrained\]'"):
        compiler_of(tiny.byte_tokenizer(), 257, (EOS,))
