"""Five hundred malformed bodies: each is answered with 4xx, the field's name in it, and none changes anything."""

import asyncio
import json
import random
import re

import pytest
from servers import post
from tiny import random_model

import llorch_jax as lj
from llorch_jax.serve.app import Settings, make_app

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]
NUMBERS = [-1, 0, 1.5, -1e300, 1e300, float("inf"), 10**30]
OTHERS = ["", "x", "\ud800", [], [[[]]], [1, "a"], [1], {}, {"a": 1}, {"": None}, {"include_usage": "no"}, True, False]
# For each field the values among these that are valid; null always is, as leaving the field out.
VALID = {
    "max_tokens": [],
    "max_new_tokens": [],
    "temperature": [0, 1.5],
    "top_p": [0],
    "top_k": [-1, 0],
    "min_p": [0],
    "n": [],
    "best_of": [],
    "logprobs": [0],
    "stream": [True, False],
    "echo": [True, False],
    "stop": ["x", "\ud800", []],
    "stop_token_ids": [[], [1]],
    "seed": [-1, 0, 10**30],
    "presence_penalty": [-1, 0, 1.5],
    "repetition_penalty": [1.5],
    "logit_bias": [{}],
    "bad_words": [[]],
    "stream_options": [{}],
    "min_tokens": [0],
    "deadline": [1.5],
    "priority": [-1, 0],
    "cache_salt": ["", "x", "\ud800"],
    "ignore_eos": [True, False],
    "unknown": [],
    "\ud800": [],
    "num_beams": [],
    "regex": ["x"],
    "json_schema": [{}],
    "guided_choice": [],
    "response_format": [],
    "structured_outputs": [],
}
WHOLE = {  # what must be there
    "/v1/completions": {"prompt": ["x", [1]]},
    "/v1/chat/completions": {"messages": []},
    "/tokenize": {"prompt": ["", "x"], "add_special_tokens": [True, False]},
    "/detokenize": {"tokens": [[], [1]]},
}
GOOD = {"prompt": "the cat", "messages": MESSAGES, "tokens": [1], "add_special_tokens": False}


def wrong_fields(dice):
    """A body of which one field is wrong, and the field's name."""
    path = dice.choice([*WHOLE, "/v1/completions", "/v1/chat/completions"])
    required = WHOLE[path]
    fields = {**required, **(VALID if path.startswith("/v1") else {"unknown": []})}
    if path.endswith("/chat/completions"):
        fields |= {"logprobs": [True, False], "top_logprobs": [0]}
        del fields["echo"]
    name = dice.choice(list(fields))
    body = {each: GOOD[each] for each in required}
    if path.startswith("/v1"):
        body |= {"temperature": 0.5, "seed": 1} | ({} if name == "max_new_tokens" else {"max_tokens": 1})
    if name in required and name != "add_special_tokens" and dice.random() < 0.2:
        del body[name]
    else:
        known = [json.dumps(each) for each in fields[name]]
        body[name] = dice.choice([each for each in [*NUMBERS, *OTHERS] if json.dumps(each) not in known])
    # Another field may come before or after it.
    order = list(body)
    dice.shuffle(order)
    return path, json.dumps({each: body[each] for each in order}).replace("Infinity", "1e999").encode(), name


def wrong_json(dice):
    """A valid body with bytes removed, repeated or replaced until it is no JSON object."""
    path = dice.choice(list(WHOLE))
    body = bytearray(json.dumps({**{name: GOOD[name] for name in WHOLE[path]}, "max_tokens": 1, "n": 1}).encode())
    while True:
        at = dice.randrange(len(body))
        change = dice.choice(["cut", "drop", "repeat", "replace", "wrap"])
        if change == "cut":
            del body[at:]
        elif change == "drop":
            del body[at]
        elif change == "repeat":
            body[at:at] = body[at : at + 8]
        elif change == "replace":
            body[at] = dice.randrange(256)
        else:
            body = bytearray(b"[" * (at + 1) + body + b"]" * dice.randint(0, at + 1))
        try:
            if isinstance(json.loads(body), dict):
                continue
        except (ValueError, RecursionError):
            pass
        return path, bytes(body), "body"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    found = random_model()
    return lj.Model(found.config, found.params, found.tokenizer, "tiny", folder)


def test_malformed_bodies_get_4xx_with_the_fields_name_and_change_nothing(model):
    dice = random.Random(0)
    bodies = {}
    while len(bodies) < 500:
        path, body, name = (wrong_json if len(bodies) % 3 == 0 else wrong_fields)(dice)
        bodies[path, body] = name

    async def check(app):
        for (path, body), name in bodies.items():
            status, answer = await post(app, path, body)
            shown = (path, body, answer)
            assert 400 <= status < 500, shown
            error = json.loads(answer)["error"]
            name = name.encode("utf-8", "backslashreplace").decode()
            assert re.match(rf"{re.escape(name)}\b", error["message"]), shown
            assert re.match(rf"{re.escape(name)}\b", error["param"] or "body"), shown
            assert len(error["message"]) < 400, shown
            assert "\n" not in error["message"], shown

    with lj.Engine(model, slots=2, page_size=8) as engine:
        before = engine.stats()
        asyncio.run(check(make_app(engine, Settings("tiny"))))
        assert engine.stats() == before
        engine.inspect(lambda core: core.pages.check([]))
