"""Chat templates: turn messages into a prompt as transformers does, in a sandbox with limits."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from llorch_jax.errors import CheckpointError
from llorch_jax.files import read_json, read_text
from llorch_jax.loading.checkpoint import Model
from llorch_jax.serve.bodies import BadRequest
from llorch_jax.serve.sandbox import Sandbox, rendered

_FILE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A model's chat template."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        """Compiles the template.

        Args:
            source: the template, in Jinja.
            tokens: special tokens by name.

        Raises:
            CheckpointError: the template is not valid.
        """
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self._template = environment.compiled(source)
        except Exception as error:
            raise CheckpointError(f"chat template: expected a valid one ({_reason(error)})"[:300]) from None
        self._tokens = tokens

    @classmethod
    def of(cls, model: Model) -> "ChatTemplate | None":
        """The template in a model's directory; None if there is none.

        Raises:
            CheckpointError: a file is damaged.
        """
        if model.directory is None:
            return None
        folder = Path(model.directory)
        settings: dict[str, Any] = {}
        if (folder / _SETTINGS).exists():
            settings = read_json(folder / _SETTINGS, CheckpointError)
            if not isinstance(settings, dict):
                raise CheckpointError(f"{folder / _SETTINGS}: expected a JSON object, got a {type(settings).__name__}")
        source = settings.get("chat_template")
        if (folder / _FILE).exists():
            source = read_text(folder / _FILE, CheckpointError)
        if isinstance(source, list):  # several templates with names
            named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        tokens = {name: _content(settings.get(name)) for name in _TOKENS}
        return cls(source, {name: token for name, token in tokens.items() if isinstance(token, str)})

    def render(self, messages: Sequence[dict[str, Any]], *, generation_prompt: bool = True) -> str:
        """The prompt made of some messages.

        Raises:
            BadRequest: the template refuses them.
        """
        values = {"messages": messages, "add_generation_prompt": generation_prompt, "tools": None, **self._tokens}
        try:
            return rendered(self._template, values)
        except Exception as error:  # a template can raise anything
            reason = f"the model's chat template refuses them ({_reason(error)})"
            raise BadRequest(f"messages: {reason}"[:300], "messages") from None


def check_messages(value: Any) -> list[dict[str, str]]:
    """The messages, each with its content as one text.

    Raises:
        BadRequest: they are not a list of such messages.
    """
    if not isinstance(value, list) or not value:
        raise BadRequest(f"messages: expected a list of messages, got {value!r:.80}", "messages")
    return [_message(number, each) for number, each in enumerate(value)]


def _message(number: int, message: Any) -> dict[str, str]:
    name = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f"{name}: expected an object with role and content, got {message!r:.80}", name)
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BadRequest(f"{name}.content: expected texts only, got {content!r:.80}", f"{name}.content")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"{name}.content: expected a text, got {content!r:.80}", f"{name}.content")
    return {
        **{key: value for key, value in message.items() if key == "name"},
        "role": message["role"],
        "content": content,
    }


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    message = " ".join(str(error).split())
    return message if isinstance(error, TemplateError) else f"{type(error).__name__}: {message}".removesuffix(": ")
