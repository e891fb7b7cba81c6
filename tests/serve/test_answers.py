"""Answers to odd combinations of fields: they are the same whole and streamed, and of the prompt that was given."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from servers import post
from tiny import END_OF_TEXT, byte_tokenizer, random_model, reciting_model
from tokenizers import processors

import llorch_jax as lj
from llorch_jax.serve.app import Settings, make_app

TEXT = "a🎈漢é!"


@pytest.fixture(scope="module")
def app():
    with lj.Engine(reciting_model(TEXT), slots=2, page_size=8) as engine:
        yield make_app(engine, Settings("tiny"))


def complete(app, **fields):
    """The JSON of an answer, or of all its events."""
    body = json.dumps({"temperature": 0, "max_tokens": 16, **fields}).encode()
    status, answer = asyncio.run(post(app, "/v1/completions", body))
    assert status == 200, answer
    if not fields.get("stream"):
        return json.loads(answer)
    events = [event.removeprefix("data: ") for event in answer.decode().split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("stop", [[], ["é"], ["漢é?", "!"]], ids=["none", "found", "withheld"])
def test_tokens_begin_at_the_same_places_whole_and_streamed(app, stop):
    (choice,) = complete(app, prompt="a", logprobs=1, stop=stop)["choices"]
    count = len(choice["logprobs"]["tokens"])
    sizes = [len(character.encode()) for character in TEXT[1:]]
    begins = [place for place, size in enumerate(sizes) for _ in range(size)] + [len(sizes)]
    assert choice["logprobs"]["text_offset"] == begins[:count]
    parts = [part["choices"][0] for part in complete(app, prompt="a", logprobs=1, stop=stop, stream=True)]
    wanted = TEXT[1:].partition(stop[-1] if stop else "\n")[0]
    assert "".join(part["text"] for part in parts) == choice["text"] == wanted
    assert [place for part in parts for place in part["logprobs"]["text_offset"]] == begins[:count]


def test_an_echo_of_ids_leaves_the_prompt_as_it_is(app):
    ids = reciting_model(TEXT).tokenizer.encode(TEXT)[:3]  # half a character, which its own text would not give again
    plain = complete(app, prompt=[ids, [END_OF_TEXT]], n=2)
    echoed = complete(app, prompt=[ids, [END_OF_TEXT]], n=2, echo=True)
    assert echoed["usage"] == plain["usage"]
    texts = [choice["text"] for choice in plain["choices"]]
    echoes = ["a\ufffd", "a\ufffd", "<|endoftext|>", "<|endoftext|>"]
    assert [choice["text"] for choice in echoed["choices"]] == [a + b for a, b in zip(echoes, texts, strict=True)]
    events = complete(app, prompt=ids, echo=True, stream=True)
    assert "".join(event["choices"][0]["text"] for event in events) == echoes[0] + texts[0]


@pytest.fixture(scope="module")
def random_app():
    model = random_model()
    with lj.Engine(model, slots=2, page_size=8, chunk=8) as engine:
        yield model, make_app(engine, Settings("tiny"))


def expected_logprobs(model, ids):
    """By the definition, from the logits of a whole pass."""
    logits = np.asarray(lj.forward(model.params, model.config, [ids])[0], np.float64)
    totals = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return logits - totals[:, None]


@pytest.mark.parametrize("length", [1, 2, 8, 9, 17, "most"])
def test_an_echo_with_log_probabilities_tells_how_likely_the_prompt_is(random_app, length):
    model, app = random_app
    most = model.config.n_positions
    ids = np.random.default_rng(1).integers(0, 256, most if length == "most" else length).tolist()
    (choice,) = complete(app, prompt=ids, echo=True, logprobs=2, max_tokens=1)["choices"]
    (plain,) = complete(app, prompt=ids, logprobs=2, max_tokens=1)["choices"]
    found = choice["logprobs"]
    rows = expected_logprobs(model, ids)
    wanted = [rows[place, id] for place, id in enumerate(ids[1:])]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1 : len(ids)], wanted, atol=1e-4)
    for place, top in enumerate(found["top_logprobs"][1 : len(ids)]):
        np.testing.assert_allclose(sorted(top.values()), np.sort(rows[place])[-2:], atol=1e-4)
    assert found["tokens"][len(ids) :] == plain["logprobs"]["tokens"]
    np.testing.assert_allclose(found["token_logprobs"][len(ids) :], plain["logprobs"]["token_logprobs"], atol=1e-5)
    assert found["text_offset"] == sorted(found["text_offset"])
    assert choice["text"].endswith(plain["text"])


def test_an_echo_with_log_probabilities_is_the_same_whole_and_streamed(random_app):
    _, app = random_app
    fields = {"prompt": ["some text", "another"], "echo": True, "logprobs": 1, "n": 2, "max_tokens": 3}
    whole = complete(app, **fields)
    events = complete(app, **fields, stream=True, stream_options={"include_usage": True})
    assert events.pop()["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 12
    for number, choice in enumerate(whole["choices"]):
        parts = [part for event in events for part in event["choices"] if part["index"] == number]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [each for part in parts for each in part["logprobs"][name]] == choice["logprobs"][name], name


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_no_tokens_gives_the_echo_alone(random_app, limit):
    model, app = random_app
    ids = model.tokenizer.encode("some text")
    fields = {"prompt": "some text", "echo": True, "logprobs": 0, limit: 0}
    body = json.dumps({**fields, "temperature": 0}).encode()
    status, answer = asyncio.run(post(app, "/v1/completions", body))
    assert status == 200, answer
    found = json.loads(answer)
    (choice,) = found["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("some text", "length")
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert found["usage"]["completion_tokens"] == 0
    status, answer = asyncio.run(post(app, "/v1/completions", json.dumps({**fields, "stream": True}).encode()))
    events = [json.loads(event.removeprefix("data: ")) for event in answer.decode().split("\n\n") if "{" in event]
    assert [part["text"] for event in events for part in event["choices"]] == ["some text"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    without = json.dumps({**fields, "echo": False}).encode()
    status, answer = asyncio.run(post(app, "/v1/completions", without))
    assert (status, json.loads(answer)["error"]["param"]) == (400, limit)


def test_a_token_that_the_tokenizer_puts_before_a_prompt_is_shown_where_the_text_begins():
    """As with `add_bos_token`: it is no part of the text."""
    tokenizer, end = byte_tokenizer(), "<|endoftext|>"
    backend = tokenizer._backend
    backend.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, END_OF_TEXT)])
    with lj.Engine(dataclasses.replace(random_model(), tokenizer=tokenizer), slots=1, page_size=8) as engine:
        app = make_app(engine, Settings("tiny"))
        (choice,) = complete(app, prompt="abc", echo=True, logprobs=0, max_tokens=1)["choices"]
    found = choice["logprobs"]
    assert found["tokens"][:4] == ["<|endoftext|>", "a", "b", "c"]
    assert found["text_offset"] == [0, 0, 1, 2, 3]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1] < 0


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_ends_with_the_deadline_of_the_texts(random_app, stream):
    _, app = random_app
    fields = {"prompt": ["some text"] * 30, "echo": True, "logprobs": 1, "deadline": 1e-4, "stream": stream}
    status, answer = asyncio.run(post(app, "/v1/completions", json.dumps(fields).encode()))
    assert status == (200 if stream else 504)
    assert b"deadline: expected an answer before the deadline" in answer
