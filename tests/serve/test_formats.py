"""Texts of a certain form over HTTP: OpenAI's `response_format`, vLLM's names and ours."""

import asyncio
import json
import re

import openai
import pytest
from servers import Running, post
from tiny import random_model

import llorch_jax as lj
from llorch_jax.serve.app import Settings, make_app

pytest.importorskip("llguidance", reason="needs the extra `constrained`")

PROMPT = "the cat"
PATTERN = "[a-m]{2,5}-[0-9]{3}"
CHOICES = ["yes", "yesterday", "no"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
LARK = "start: /[a-f]{3,9}/"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    found = random_model()
    model = lj.Model(found.config, found.params, found.tokenizer, "tiny", folder)
    with lj.Engine(model, slots=2, page_size=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    running = Running(engine, Settings("tiny"))
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    running.close()


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"regex": PATTERN}, {"regex": PATTERN}),
        ({"guided_regex": PATTERN}, {"regex": PATTERN}),
        ({"structured_outputs": {"regex": PATTERN, "json": None}}, {"regex": PATTERN}),
        ({"json_schema": SCHEMA}, {"json_schema": SCHEMA}),
        ({"json_schema": json.dumps(SCHEMA)}, {"json_schema": SCHEMA}),
        ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}),
        ({"response_format": FORMAT}, {"json_schema": SCHEMA}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        ({"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}),
        ({"choices": CHOICES}, {"choices": CHOICES}),
        ({"guided_choice": CHOICES}, {"choices": CHOICES}),
        ({"structured_outputs": {"choice": CHOICES}}, {"choices": CHOICES}),
        ({"grammar": LARK}, {"grammar": LARK}),
        ({"guided_grammar": LARK, "response_format": {"type": "text"}}, {"grammar": LARK}),
        ({"response_format": {"type": "text"}}, {}),
        ({"regex": PATTERN, "ignore_eos": True, "min_tokens": 4}, {"regex": PATTERN}),
    ],
)
def test_a_text_is_that_of_generate_with_the_constraint(engine, client, fields, constraint):
    settings = {"temperature": 1.0, "seed": 4}
    wanted = lj.generate(engine.model, PROMPT, 40, **settings, **constraint)
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, extra_body=fields, **settings)
    assert found.choices[0].text == wanted.text
    assert found.choices[0].finish_reason == wanted.finish_reason


def test_chat_streams_and_samples(engine, client):
    messages = [{"role": "user", "content": PROMPT}]
    settings = {"temperature": 1.0, "seed": 4}
    wanted = lj.generate(engine.model, [PROMPT] * 2, 40, **settings, json_schema=SCHEMA)
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=40, n=2, response_format=FORMAT, **settings
    )
    assert [choice.message.content for choice in found.choices] == [each.text for each in wanted]
    assert [choice.finish_reason for choice in found.choices] == [each.finish_reason for each in wanted]
    parts = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=40, n=2, response_format=FORMAT, stream=True, **settings
    )
    texts = ["", ""]
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].delta.content or ""
    assert texts == [each.text for each in wanted]
    shown = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=40, logprobs=1, temperature=0, extra_body={"regex": PATTERN}
    )
    greedy = lj.generate(engine.model, PROMPT, 40, regex=PATTERN, top_logprobs=1)
    assert shown.choices[0].logprobs.token_logprobs == pytest.approx(greedy.logprobs, abs=1e-4)


BAD = [
    ({"regex": "(a"}, "regex", "unclosed group"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
    ({"regex": 5}, "regex", "expected a str"),
    ({"json_schema": {"type": "text"}}, "json_schema", "Invalid type"),
    ({"guided_json": "{"}, "guided_json", "expected the JSON of an object"),
    ({"choices": []}, "choices", "expected one text or more"),
    ({"grammar": "start: noun"}, "grammar", "noun"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "text"}}}}, "response_format", ""),
    ({"response_format": {"type": "json_schema"}}, "response_format", '"schema": an object'),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}}, "response_format", "an object"),
    ({"response_format": {"type": "xml"}}, "response_format", "expected the type text, json_object or json_schema"),
    ({"response_format": "json_object"}, "response_format", "expected the type"),
    ({"structured_outputs": {}}, "structured_outputs", "got none"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "got regex and json"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs", "got 'whitespace_pattern'"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs", "got 'json_object'"),
    ({"structured_outputs": [1]}, "structured_outputs", "expected one of json, regex, choice"),
    ({"regex": "a", "grammar": "start: /a/"}, "grammar", "expected either this or regex, got both"),
    ({"regex": "a", "guided_regex": "a"}, "guided_regex", "expected either this or regex, got both"),
    ({"regex": "a", "response_format": FORMAT}, "response_format", "expected either this or regex, got both"),
    ({"regex": "a+", "stop": "x"}, "stop", "expected none with constrained generation"),
    ({"guided_regex": "a?", "stop_token_ids": [64]}, "guided_regex", "expected texts of one character or more"),
]


def test_what_is_wrong_gets_400_with_the_fields_name_before_anything_is_queued(engine):
    assert engine.model.tokenizer.encode("a") == [64]

    async def check():
        app = make_app(engine, Settings("tiny"))
        for fields, param, message in BAD:
            body = {"prompt": [PROMPT, "a dog"], "n": 2, "max_tokens": 9, **fields}
            status, answer = await post(app, "/v1/completions", json.dumps(body).encode())
            error = json.loads(answer)["error"]
            assert (status, error["param"]) == (400, param), error
            assert re.match(rf"{param}: ", error["message"]), error
            assert message in error["message"], error

    before = engine.stats().requests
    asyncio.run(check())
    assert engine.stats().requests == before
