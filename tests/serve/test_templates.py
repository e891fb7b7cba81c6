"""Chat templates: whatever one does, the request is refused in one line and in time; limits that no good one meets."""

import asyncio
import json
import time

import pytest
from servers import post
from tiny import random_model

import llorch_jax as lj
from llorch_jax.errors import CheckpointError
from llorch_jax.serve import sandbox
from llorch_jax.serve.app import Settings, make_app
from llorch_jax.serve.bodies import BadRequest
from llorch_jax.serve.templates import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}"
END = "{% endfor %}{% endfor %}"
FAULTS = {
    "a division by zero": ("{{ 1 // (messages|length - 2) }}", "ZeroDivisionError: "),
    "endless recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
    "a call of no function": ("{{ messages[0].role() }}", "TypeError|is not callable|safely callable"),
    "an unknown name": ("{{ nothing.role }}", "'nothing' is undefined"),
    "a template in a file": ("{% include 'other' %}", "no loader"),
    "a range that is too large": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
    "a number that is too large": ("{{ 2.0 ** 5000 }}", "OverflowError: "),
    "an attribute that is not for templates": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    "lines of a message": ("{{ raise_exception('a\n\nb') }}", r"refuses them \(a b\)"),
    "half a character": ("{{ raise_exception('\\ud800') }}", "refuses them"),
    "a loop without an end": (LONG + END, "within 0.2 s"),
    "a loop that is told by its length": (LONG + "{{ loop.length }}" + END, "within 0.2 s|4,194,304"),
    "a loop with a condition": (LONG.replace("99999) %}{", "99999) if i < 0 or i %}{") + END, "within 0.2 s"),
    "a loop that calls itself": (
        "{% for i in range(999) recursive %}{% if loop.depth < 4 %}{{ loop(range(999)) }}{% endif %}{% endfor %}",
        "within 0.2 s",
    ),
    "calls without an end": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "within 0.2 s",
    ),
    "much text": ("{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}", "4,194,304 characters"),
    "a large product": ("{{ 'x' * (messages|length * 10 ** 10) }}", r"result of \* within 4,194,304"),
    "a large product of a list": ("{{ (messages|length * 10 ** 10) * ['x'] }}", r"result of \* within 4,194,304"),
    "a large power": ("{{ messages|length ** (10 ** 10) }}", r"result of \*\* within"),
    "text that doubles": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        r"result of \+ within",
    ),
    "a number that doubles": (
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        r"result of \* within",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_a_template_raises_is_the_message_of_a_bad_request(monkeypatch, name):
    source, message = FAULTS[name]
    if "within 0.2 s" in message:  # the others have the whole time, as the machine may be busy
        monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.2)
    template = ChatTemplate(source, {})
    start = time.monotonic()
    with pytest.raises(BadRequest, match=message) as caught:
        template.render(MESSAGES)
    assert time.monotonic() - start < 10
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert caught.value.message.startswith("messages: the model's chat template refuses them (")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) <= 300


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ 1 +",
        "{% for i in messages %}" * 30 + "{% endfor %}" * 30,  # Python nests no more than 20 blocks
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% break %}",
    ],
)
def test_a_template_that_cannot_be_compiled_is_refused(source):
    with pytest.raises(CheckpointError, match=r"chat template: expected a valid one \(.+\)?") as caught:
        ChatTemplate(source, {})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("settings", ["{", "[]", "7", '{"chat_template": "{{"}'])
def test_damaged_settings_are_refused(tmp_path, settings):
    model = random_model()
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match="expected") as caught:
        ChatTemplate.of(lj.Model(model.config, model.params, model.tokenizer, "tiny", tmp_path))
    assert "\n" not in str(caught.value)


GOOD = """{%- set ns = namespace(n=0) -%}
{% for m in messages if m.role != 'tool' -%}
{{ loop.index0 }}/{{ loop.length }}{{ ' first' if loop.first }}{{ ' last' if loop.last }}
{{- loop.previtem.role if loop.index0 }}
{%- for key, value in m.items() %} {{ key }}={{ value|trim }}{% endfor %}
{%- set ns.n = ns.n + m.content|length * 2 %};
{% else %}nothing
{% endfor %}
{{- bos_token * 2 }}{{ ns.n ** 2 }}{{ messages[0]|tojson }}{% if add_generation_prompt %}!{% endif %}"""


def test_a_good_template_is_rendered_as_by_jinja():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    values = {"bos_token": "<s>", "messages": MESSAGES, "add_generation_prompt": True, "tools": None}
    wanted = environment.from_string(GOOD).render(values)
    assert "1/2 lastuser role=assistant content=ho;" in wanted
    assert ChatTemplate(GOOD, {"bos_token": "<s>"}).render(MESSAGES) == wanted


def test_the_server_answers_400_and_goes_on(tmp_path):
    """An exception that escapes would be raised here."""
    found = random_model()
    (tmp_path / "chat_template.jinja").write_text(
        "{{ raise_exception(messages[0].content) if 1 // (1 - n|default(1)) }}"
    )
    model = lj.Model(found.config, found.params, found.tokenizer, "tiny", tmp_path)
    with lj.Engine(model, slots=1, page_size=8) as engine:
        app = make_app(engine, Settings("tiny"))
        for content in ("x", "\ud800"):
            body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
            status, answer = asyncio.run(post(app, "/v1/chat/completions", body))
            assert (status, json.loads(answer)["error"]["param"]) == (400, "messages")
        assert asyncio.run(post(app, "/tokenize", b'{"prompt": "a"}'))[0] == 200
