"""Constraints in the engine: texts are those of `generate`, whatever else is running."""

import re
import sys
import threading

import jax
import pytest
from tiny import END_OF_TEXT, byte_tokenizer, random_model, random_params, reciting_model

import llorch_jax as lj
from llorch_jax.text.constrained import matching

pytest.importorskip("llguidance", reason="needs the extra `constrained`")

PROMPT = "the cat"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CASES = [
    {"regex": "[a-m]{2,5}-[0-9]{3}"},
    {"regex": "[a-m]{2,5}-[0-9]{3}", "temperature": 1.0, "seed": 3},
    {"json_schema": SCHEMA, "temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2, "seed": 5},
    {"choices": ["yes", "yesterday", "no", "näh"], "temperature": 1.0, "seed": 1, "top_logprobs": 2},
    {"grammar": 'root ::= "<" [a-f]{1,9} ">"', "bad_words": [[97], [98, 99]], "min_new_tokens": 5},
    {"regex": "[a-z]+", "max_new_tokens": 7, "logit_bias": {97: 50.0, 98: -50.0}},
    {"regex": "é{2,9}", "max_new_tokens": 5},
    {"regex": "[a-z]{3,40}", "stop_ids": [99, 100], "temperature": 1.0, "seed": 2},
    {"constraint": [None], "max_new_tokens": 9},
    {"temperature": 0.9, "seed": 3, "max_new_tokens": 30},
    {"stop": "e", "max_new_tokens": 30},
]


def same(got, wanted):
    assert (got.text, got.token_ids) == (wanted.text, wanted.token_ids)
    assert (got.finish_reason, got.stop_reason) == (wanted.finish_reason, wanted.stop_reason)
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert (got.top_logprobs is None) == (wanted.top_logprobs is None)


@pytest.fixture(scope="module")
def model():
    """With ids that stand for no token, as in a vocabulary that is padded."""
    return random_model(vocab_size=300, n_layer=1)


@pytest.fixture(scope="module")
def engine(model):
    """With pages for one long text and a bit, so that texts are preempted."""
    with lj.Engine(model, slots=3, page_size=8, num_pages=8) as engine:
        yield engine


def test_texts_are_those_of_generate(model, engine):
    jobs = [{"prompt": PROMPT[: 3 + number % 3], "max_new_tokens": 48} | each for number, each in enumerate(CASES * 2)]
    handles = [engine.submit(**job) for job in jobs]
    for number, handle in enumerate(handles):
        got = handle.result(120)
        if number < len(CASES):
            wanted = lj.generate(model, **jobs[number])
            same(got, wanted)
        assert "".join(piece.text for piece in handle) == got.text
    stats = engine.stats()
    assert (stats.failures, stats.pages.held) == (0, 0)
    assert stats.preemptions > 0


def test_samples_are_those_of_generate_with_the_same_keys(model, engine):
    """`generate_n` takes no constraint; sample i has the key of row i."""
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 7, "regex": "[a-z]{4,8}!"}
    wanted = lj.generate(model, [PROMPT] * 3, **options)
    handles = [engine.submit(PROMPT, sample=i, **options) for i in range(3)]
    assert [handle.result(60).token_ids for handle in handles] == [each.token_ids for each in wanted]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"json_schema": {"type": "text"}}, "json_schema: Invalid type: text"),
        ({"choices": []}, "choices: expected one text or more"),
        ({"regex": "a", "grammar": "start: /a/"}, "expected one of"),
        ({"constraint": [lj.Constraint.regex("a")] * 2}, "constraint: expected one per prompt, 1, got 2"),
        ({"regex": "a?", "stop_ids": [97]}, "constraint: expected texts of one character or more"),
    ],
)
def test_bad_constraints_are_refused_at_once(engine, options, message):
    if "stop_ids" in options:
        options["stop_ids"] = byte_tokenizer().encode("a")
    before = engine.stats().requests
    with pytest.raises(lj.ConstraintError, match=message):
        engine.submit(PROMPT, **options)
    assert engine.stats().requests == before


def test_constraints_are_compiled_in_the_callers_thread(engine, monkeypatch):
    compiled = []
    make = matching.Compiler._grammar

    def noted(self, constraint):
        compiled.append(threading.current_thread())
        return make(self, constraint)

    monkeypatch.setattr(matching.Compiler, "_grammar", noted)
    handles = [engine.submit(PROMPT, max_new_tokens=9, regex="[p-s]{5}") for _ in range(2)]
    assert [len(handle.result(60).token_ids) for handle in handles] == [5, 5]
    assert compiled == [threading.current_thread()]


def test_without_llguidance_constraints_are_refused_and_everything_else_works(monkeypatch):
    model = random_model(n_layer=1)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert not matching.can_constrain()
    with lj.Engine(model, slots=1, page_size=8) as engine:
        with pytest.raises(lj.ConstraintError, match=r"pip install 'llorch-jax\[constrained\]'"):
            engine.submit(PROMPT, regex="a+")
        assert engine.submit(PROMPT, max_new_tokens=3).result(60).finish_reason == "length"


@pytest.fixture(scope="module")
def reciting():
    with lj.Engine(reciting_model("one two three"), slots=2, page_size=8) as engine:
        yield engine


class TestEnds:
    """With a model that says "ne two three" and then ends."""

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"regex": "ne( two)?"}, ("ne two", "stop", None)),
            ({"regex": "[a-z ]+"}, ("ne two three", "stop", END_OF_TEXT)),
            ({"regex": "[a-z ]{30}"}, (None, "length", None)),
            ({"regex": "ne( two)?", "min_new_tokens": 9, "forced_tokens": [120]}, (None, "stop", None)),
            ({"regex": "ne( two)?", "logit_bias": {END_OF_TEXT: -float("inf")}}, ("ne two", "stop", None)),
        ],
    )
    def test_they_are_those_of_generate(self, reciting, options, expected):
        got = reciting.submit("o", max_new_tokens=20, **options).result(60)
        same(got, lj.generate(reciting.model, "o", 20, **options))
        text, *reasons = expected
        assert [got.finish_reason, got.stop_reason] == reasons
        assert text is None or got.text == text

    def test_at_a_stop_id_that_leaves_no_other_token_the_text_is_complete(self, reciting):
        (space,) = byte_tokenizer().encode(" ")
        for new in (2, 3):
            options = {"regex": "ne( two)?", "stop_ids": [space], "max_new_tokens": new}
            same(reciting.submit("o", **options).result(60), lj.generate(reciting.model, "o", **options))

    def test_a_text_that_cannot_go_on_fails_alone_with_the_same_error(self, reciting):
        (space,) = byte_tokenizer().encode(" ")
        doomed = reciting.submit("o", max_new_tokens=20, regex="ne two", stop_ids=[space])
        other = reciting.submit("o", max_new_tokens=20, regex="ne two")
        with pytest.raises(lj.ConstraintError, match="none in the vocabulary"):
            doomed.result(60)
        assert re.fullmatch("ne two", other.result(60).text)
        assert reciting.stats().failures == 0


def test_a_row_without_a_constraint_fails_as_it_would_alone():
    """In a batch beside a row with one: a constraint wins over settings only in its own row."""
    model = random_model(n_layer=1)
    banned = {"logit_bias": dict.fromkeys(range(257), -float("inf"))}
    with pytest.raises(lj.SamplerError, match="got none for row 1"):
        lj.generate(model, ["a", "b"], 4, constraint=[lj.Constraint.regex("[a-z]{4}"), None], **banned)
    assert len(lj.generate(model, "a", 4, regex="[a-z]{4}", **banned).token_ids) == 4


def test_weights_that_are_not_numbers_are_told_from_settings_that_exclude_all():
    config = random_model(vocab_size=300, n_layer=1).config
    params = jax.tree.map(lambda leaf: leaf * float("nan"), random_params(config))
    broken = lj.Model(config, params, byte_tokenizer(), "broken")
    with pytest.raises(lj.NonFiniteError):
        lj.generate(broken, "a", 2)
