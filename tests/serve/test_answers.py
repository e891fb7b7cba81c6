"""Answers to odd combinations of fields: they are the same whole and streamed, and of the prompt that was given."""

import asyncio
import json

import pytest
from servers import post
from tiny import END_OF_TEXT, reciting_model

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
