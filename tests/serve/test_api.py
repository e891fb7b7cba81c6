"""The server over a real socket: with OpenAI's own client, with raw HTTP, with curl, and with clients that vanish."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest
from servers import Running
from tiny import random_model

import llorch_jax as lj
from llorch_jax.serve.app import Settings
from llorch_jax.serve.bodies import BadRequest, Fields
from llorch_jax.serve.cache_map import snapshot

PROMPT = "the cat"
KEY = "secret"
TEMPLATE = """{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
{{ m.role }}: {{ m.content }}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a chat template in its directory."""
    folder = tmp_path_factory.mktemp("model")
    found = random_model()
    settings = {"chat_template": TEMPLATE, "bos_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return lj.Model(found.config, found.params, found.tokenizer, "tiny", folder)


@pytest.fixture(scope="module")
def engine(model):
    with lj.Engine(model, slots=2, page_size=8, max_waiting=8, offload_bytes=2**16) as engine:
        yield engine


@pytest.fixture(scope="module")
def running(engine):
    running = Running(engine, Settings("tiny", KEY, max_body=2000, max_texts=4, map_seconds=0.005))
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(running, path, body=None, key=KEY, method=None):
    """Status and JSON of an answer."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(running.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_completion_is_the_text_of_generate(model, client):
    wanted = lj.generate(model, PROMPT, max_new_tokens=6, temperature=0.8, seed=4)
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0.8, seed=4)
    assert found.choices[0].text == wanted.text
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (7, 6, 13)
    parts = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0.8, seed=4, stream=True)
    assert "".join(part.choices[0].text for part in parts) == wanted.text


def test_several_prompts_samples_echo_and_log_probabilities(model, client):
    wanted = lj.generate_n(model, PROMPT, n=2, max_new_tokens=4, temperature=1.0, seed=9, top_logprobs=2)
    found = client.completions.create(
        model="tiny", prompt=[PROMPT, "a dog"], n=2, max_tokens=4, temperature=1, seed=9, logprobs=2
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices[:2]] == [each.text for each in wanted]
    shown = found.choices[0].logprobs
    assert shown.token_logprobs == pytest.approx(wanted[0].logprobs, abs=1e-4)
    assert [len(top) for top in shown.top_logprobs] == [2] * 4
    assert shown.text_offset[0] == 0
    echoed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + lj.generate(model, PROMPT, max_new_tokens=2).text


def test_stop_bias_penalties_and_the_names_of_vllm(model, client):
    plain = lj.generate(model, PROMPT, max_new_tokens=8)
    stop = plain.text[3:5]
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, stop=stop)
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].text == lj.generate(model, PROMPT, max_new_tokens=8, stop=stop).text
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    extra = {"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "stop_token_ids": [40]}
    bias = {plain.token_ids[0]: -100}
    found = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=5,
        logit_bias={str(k): v for k, v in bias.items()},
        extra_body=extra,
        **options,
    )
    wanted = lj.generate(
        model,
        PROMPT,
        max_new_tokens=5,
        logit_bias=bias,
        top_k=30,
        min_p=0.01,
        repetition_penalty=1.1,
        min_new_tokens=2,
        stop_ids=[40],
        **options,
    )
    assert found.choices[0].text == wanted.text


def test_chat_goes_through_the_models_template(model, client):
    messages = [{"role": "user", "content": "hi"}]
    prompt = "user: hi\nassistant:"
    wanted = lj.generate(model, prompt, max_new_tokens=5, top_logprobs=2)
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    assert found.choices[0].message.content == wanted.text
    assert found.usage.prompt_tokens == len(wanted.prompt_ids)
    shown = found.choices[0].logprobs.content
    assert [each.logprob for each in shown] == pytest.approx(wanted.logprobs, abs=1e-4)
    assert bytes(shown[0].bytes) == model.tokenizer.bytes_of(wanted.token_ids[0])
    parts = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=5,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == wanted.text
    assert parts[-1].usage.completion_tokens == 5


def test_models_tokens_and_health(model, running, client):
    assert [each.id for each in client.models.list()] == ["tiny"]
    ids = model.tokenizer.encode(PROMPT)
    assert ask(running, "/tokenize", {"prompt": PROMPT}) == (200, {"count": 7, "max_model_len": 64, "tokens": ids})
    assert ask(running, "/detokenize", {"tokens": ids}) == (200, {"prompt": PROMPT})
    assert ask(running, "/health", key=None) == (200, {"status": "ok"})


def test_metrics_are_in_the_format_of_prometheus(running, engine):
    from prometheus_client.parser import text_string_to_metric_families

    request = urllib.request.Request(f"{running.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        found = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    assert found["llorch_new_tokens"].samples[0].value == engine.stats().new_tokens
    for name in ("pages", "bytes", "saved", "restored", "dropped"):
        assert found[f"llorch_offload_{name}"].samples[0].value == getattr(engine.stats().offload, name)
    buckets = [
        each.value for each in found["llorch_time_to_first_token_seconds"].samples if each.name.endswith("_bucket")
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == engine.stats().requests - engine.stats().waiting - engine.stats().cancelled


BAD = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [5000]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({}, "prompt"),
    ({"prompt": PROMPT, "max_tokens": 0}, "max_tokens"),
    ({"prompt": PROMPT, "max_tokens": "9"}, "max_tokens"),
    ({"prompt": PROMPT, "max_tokens": 2, "max_new_tokens": 3}, "max_new_tokens"),
    ({"prompt": PROMPT, "temperature": "hot"}, "temperature"),
    ({"prompt": PROMPT, "temperature": -1}, "temperature"),
    ({"prompt": PROMPT, "temperature": [1.0]}, "temperature"),
    ({"prompt": PROMPT, "top_p": 2}, "top_p"),
    ({"prompt": PROMPT, "top_k": 1.5}, "top_k"),
    ({"prompt": PROMPT, "n": 0}, "n"),
    ({"prompt": PROMPT, "n": 5}, "n"),
    ({"prompt": PROMPT, "n": True}, "n"),
    ({"prompt": PROMPT, "best_of": 3}, "best_of"),
    ({"prompt": PROMPT, "stream": "yes"}, "stream"),
    ({"prompt": PROMPT, "stream_options": {"x": 1}}, "stream_options"),
    ({"prompt": PROMPT, "logprobs": 21}, "logprobs"),
    ({"prompt": PROMPT, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": PROMPT, "stop_ids": [999]}, "stop_ids"),
    ({"prompt": PROMPT, "max_new_tokens": [1]}, "max_new_tokens"),
    ({"prompt": PROMPT, "repetition_penalty": [1.5]}, "repetition_penalty"),
    ({"prompt": PROMPT, "logit_bias": {"5000": 1}}, "logit_bias"),
    ({"prompt": PROMPT, "logit_bias": []}, "logit_bias"),
    ({"prompt": PROMPT, "stop": [""]}, "stop"),
    ({"prompt": PROMPT, "stop_token_ids": [999]}, "stop_token_ids"),
    ({"prompt": PROMPT, "seed": 1.5}, "seed"),
    ({"prompt": PROMPT, "suffix": "x"}, "suffix"),
    ({"prompt": PROMPT, "mirostat_tau": 5.0}, "mirostat_tau"),
    ({"prompt": PROMPT, "num_beams": 2}, "num_beams"),
    ({"prompt": PROMPT, "priority": 1.5}, "priority"),
    ({"prompt": PROMPT, "deadline": -1}, "deadline"),
    ({"prompt": PROMPT, "cache_salt": 5}, "cache_salt"),
    ({"prompt": PROMPT, "unknown": 5}, "unknown"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_a_bad_value_gets_400_with_its_name(running, engine, body, param):
    before = engine.stats().requests
    status, found = ask(running, "/v1/completions", body)
    assert status == 400
    assert found["error"]["param"] == param
    assert re.match(rf"{re.escape(param)}\b", found["error"]["message"])
    assert engine.stats().requests == before


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"1": 2, "x": 3}, "expected ids as keys, got 'x'"),
        ({"1": 2, " 7": 3}, "expected ids as keys, got ' 7'"),
        ({"7": 2, "07": 3}, "expected ids as keys, got '07'"),
        ({"1": 2, "-1": 3}, "expected ids as keys, got '-1'"),
        ({"1": 2, "9" * 5000: 3}, "expected ids as keys, got '999"),
        ({"1": 2, "7": "x"}, "expected a number for the id 7, got 'x'"),
        ({"1": 2, "7": True}, "expected a number for the id 7, got True"),
        ({"1": 2, "7": 1e39}, "expected a number for the id 7, got 1e[+]39"),
    ],
)
def test_a_bad_bias_is_told_by_the_key_that_is_wrong(bias, message):
    with pytest.raises(BadRequest, match=f"^logit_bias: {message}") as caught:
        Fields({"logit_bias": bias}).options(16, 0, [])
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
    ],
)
def test_bad_messages_get_400_with_the_name(running, body, param):
    status, found = ask(running, "/v1/chat/completions", body)
    assert (status, found["error"]["param"]) == (400, param)


def test_a_prompt_that_does_not_fit_is_refused(running):
    status, found = ask(running, "/v1/completions", {"prompt": "a" * 60, "max_tokens": 30})
    assert status == 400
    assert "within the context of 64, got 60 and 30 tokens" in found["error"]["message"]


@pytest.mark.parametrize(
    ("path", "method", "body", "key", "status"),
    [
        ("/v1/completions", "POST", b"{", KEY, 400),
        ("/v1/completions", "POST", b"\xff\xfe", KEY, 400),
        ("/v1/completions", "POST", b"[" * 1500, KEY, 400),
        ("/v1/completions", "POST", b'{"prompt": NaN}', KEY, 400),
        ("/v1/completions", "POST", b"x" * 3000, KEY, 413),
        ("/v1/completions", "GET", None, KEY, 405),
        ("/v1/nothing", "GET", None, KEY, 404),
        ("/v1/completions", "POST", b"{}", None, 401),
        ("/v1/models", "GET", None, "wrong", 401),
        ("/metrics", "GET", None, None, 401),
        ("/debug/cache", "GET", None, None, 401),
    ],
)
def test_bad_requests_get_an_error_as_json(running, path, method, body, key, status):
    found, answer = ask(running, path, body, key, method)
    assert found == status
    assert answer["error"]["message"]


def test_a_client_that_vanishes_costs_nothing(running, engine):
    """In the middle of a stream, and while waiting for a whole answer."""
    for stream in (True, False):
        before = engine.stats().cancelled
        body = json.dumps({"prompt": PROMPT, "max_tokens": 57, "stream": stream}).encode()
        fields = ["Host: x", f"Authorization: Bearer {KEY}", f"Content-Length: {len(body)}"]
        head = "\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "", ""])
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(head.encode() + body)
            if stream:
                assert connection.recv(1)
            else:
                wait_for(lambda: engine.stats().running)
        wait_for(lambda: engine.stats().pages.held == 0)
        assert engine.stats().cancelled in (before, before + 1)  # it may just have ended


def test_where_too_many_wait_others_are_told_to_come_again(model):
    with lj.Engine(model, slots=1, page_size=8, max_waiting=1) as engine:
        running = Running(engine, Settings("tiny"))
        try:
            first = engine.submit(PROMPT, max_new_tokens=57)
            next(iter(first))
            second = engine.submit(PROMPT, max_new_tokens=1)
            request = urllib.request.Request(f"{running.url}/v1/completions", b'{"prompt": "a", "max_tokens": 1}')
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            with caught.value as error:
                assert (error.code, error.headers["Retry-After"]) == (429, "1")
                assert "expected fewer than 1 waiting requests" in json.loads(error.read())["error"]["message"]
            second.result(60)
        finally:
            running.close()


def test_a_deadline_gets_504(running):
    status, found = ask(running, "/v1/completions", {"prompt": PROMPT, "max_tokens": 57, "deadline": 0.001})
    assert status == 504
    assert "deadline" in found["error"]["message"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_stream(running):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "stream": True})
    command = ["curl", "-sN", f"{running.url}/v1/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n\n")
    assert [line[:6] for line in lines] == ["data: "] * 3 + [""]
    assert lines[2] == "data: [DONE]"


def test_the_map_of_the_cache_shows_who_holds_which_page(running, engine):
    request = urllib.request.Request(f"{running.url}/debug/cache", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        first = json.loads(answer.readline()[6:])
        assert (first["page_size"], first["slots"], first["running"]) == (8, 2, [])
        assert first["offload"]["total"] == 2**16 // (2 * 2 * 2 * 8 * 4 * 8)  # as in tiny.CONFIG, pages of 8
        handle = engine.submit(PROMPT * 2, max_new_tokens=40)
        seen = []
        for line in answer:
            if line.startswith(b"data: "):
                seen.append(json.loads(line[6:]))
                if handle.done and not seen[-1]["running"]:
                    break
        busy = next(each for each in seen if each["running"])
        (shown,) = busy["running"]
        assert shown["prompt"] == 14
        assert sum(holders > 0 for holders in busy["holders"]) == len(shown["pages"])
        assert not any(holders > 0 for holders in seen[-1]["holders"])


def test_a_snapshot_stays_as_it_is_while_the_engine_goes_on(engine):
    handle = engine.submit(PROMPT, max_new_tokens=57)
    pairs = []
    while not pairs and not handle.done:
        pairs = engine.inspect(
            lambda core: [
                (shown["pages"], each.pages) for shown, each in zip(snapshot(core)["running"], core.active, strict=True)
            ]
        )
    handle.result(60)
    for shown, own in pairs:
        assert shown is not own
    assert pairs
