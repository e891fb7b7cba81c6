"""Request bodies: JSON objects whose fields must all be known and valid, and are named in every error."""

import json
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from llorch_jax.errors import LlorchError
from llorch_jax.sampling import bias_of_json
from llorch_jax.serve.formats import GUIDED, response_format, structured_outputs
from llorch_jax.text.constrained.constraint import KINDS
from llorch_jax.text.options import SAMPLING, GenerationOptions
from llorch_jax.tracing import is_whole

MOST_SAMPLES = 128
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_REFUSED = {
    "suffix": "text is only continued at its end",
    "functions": "the model cannot call functions",
    "function_call": "the model cannot call functions",
    "tools": "the model cannot call tools",
    "tool_choice": "the model cannot call tools",
    "modalities": "only text is generated",
    "audio": "only text is generated",
    "prediction": "the engine does not speculate",
}
# The names used by OpenAI and vLLM, and ours.
_RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_token_ids": "stop_ids",
    "repeat_penalty": "repetition_penalty",
    **GUIDED,
}
_OPTIONS = ("seed", "stop", "stop_ids", "temperature", *KINDS, *SAMPLING)
_FORMATS = {"response_format": response_format, "structured_outputs": structured_outputs}


class BadRequest(Exception):
    """A request that cannot be answered.

    Attributes:
        message: what was expected and what was given.
        param: the name of the field.
        status: HTTP status code.
        headers: headers of the answer.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.headers = headers


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        BadRequest: it is not a JSON object.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"got {name}")

    try:
        found = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise BadRequest("body: expected a JSON object, got one that is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadRequest(f"body: expected a JSON object ({error})"[:300]) from None
    if not isinstance(found, dict):
        raise BadRequest(f"body: expected a JSON object, got a {type(found).__name__}")
    for name in found:
        if name in _REFUSED and found[name] not in (None, "", [], "none"):
            raise BadRequest(f"{name}: expected none, as {_REFUSED[name]}", name)
    return {name: value for name, value in found.items() if value is not None and name not in _REFUSED}


class Fields:
    """The fields of a body, taken one by one; any left at the end are unknown.

    Attributes:
        names: the names by which the body gives options, by our names.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.names: dict[str, str] = {}
        self._left = {name: value for name, value in body.items() if name not in _IGNORED}

    def take(self, name: str, default: Any = None) -> Any:
        """A field's value."""
        return self._left.pop(name, default)

    def flag(self, name: str) -> bool:
        """A field that is true or false; false by default."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise BadRequest(f"{name}: expected true or false, got {value!r:.80}", name)
        return value

    def number(self, name: str, default: int, least: int, most: int) -> int:
        """A field that is a whole number."""
        value = self.take(name, default)
        if not is_whole(value) or not least <= value <= most:
            raise BadRequest(f"{name}: expected a whole number in {least} .. {most}, got {value!r:.80}", name)
        return int(value)

    def text(self, name: str, default: str | None = "") -> str:
        """A field that is a text; without a default it must be given."""
        value = self.take(name, default)
        if not isinstance(value, str):
            raise BadRequest(f"{name}: expected a text, got {value!r:.80}", name)
        return value

    def options(self, default_tokens: int, top_logprobs: int, eos_ids: Iterable[int]) -> GenerationOptions:
        """The generation options, given by our names or by those of OpenAI and vLLM.

        Args:
            default_tokens: maximum number of new tokens if the body does not set one.
            top_logprobs: number of alternatives to report.
            eos_ids: ids that end a text, which `ignore_eos` bans.
        """
        given: dict[str, Any] = {}
        for name in list(self._left):
            ours = _RENAMED.get(name, name)
            if ours in (*_OPTIONS, "max_new_tokens"):
                if ours in given:
                    raise BadRequest(f"{name}: expected either this or {self.names[ours]}, got both", name)
                given[ours] = self.take(name)
                self.names[ours] = name
        given |= self._constraint({kind: given.pop(kind) for kind in KINDS if kind in given})
        if self.flag("ignore_eos"):
            given["logit_bias"] = {**dict.fromkeys(eos_ids, float("-inf")), **_bias(given.get("logit_bias", {}))}
        elif "logit_bias" in given:
            given["logit_bias"] = _bias(given["logit_bias"])
        given.setdefault("max_new_tokens", default_tokens)
        given.setdefault("temperature", 1.0)
        given.setdefault("seed", secrets.randbits(32))
        try:
            return GenerationOptions.create(top_logprobs=top_logprobs, **given)
        except (LlorchError, TypeError, ValueError, OverflowError) as error:
            raise refusal(error, self.names) from None

    def _constraint(self, given: dict[str, Any]) -> dict[str, Any]:
        """The constraint among those that are given, or in the fields that describe a format; none, or one by kind."""
        found = [(self.names[kind], (kind, source)) for kind, source in given.items()]
        for name, read in _FORMATS.items():
            value = self.take(name)
            try:
                form = None if value is None else read(value)
            except ValueError as error:
                raise BadRequest(f"{name}: {error}", name) from None
            if form is not None:
                found.append((name, form))
        if len(found) > 1:
            (first, _), (second, _) = found[:2]
            raise BadRequest(f"{second}: expected either this or {first}, got both", second)
        for name, (kind, _) in found:
            self.names |= {kind: name, "constraint": name}
        return dict(form for _, form in found)

    def end(self) -> None:
        """Raises BadRequest if there is a field that has not been taken."""
        for name in self._left:
            raise BadRequest(f"{name}: expected a known field, got an unknown one"[:200], name[:100])


def refusal(error: Exception, names: Mapping[str, str] | None = None) -> BadRequest:
    """The answer to an error from the library.

    Args:
        error: its message begins with the name of a setting, or with two that are joined by "and".
        names: the names of settings in the body, by our names.
    """
    message = " ".join(str(error).split())
    name, colon, rest = message.partition(":")
    known = {"max_new_tokens": "max_tokens", **(names or {})}
    shown = " and ".join(known.get(each, each) for each in name.split(" and "))
    param = shown.split(" ")[0] if colon and len(shown) < 40 else None
    return BadRequest(f"{shown}{colon}{rest}", param)


def _bias(value: Any) -> dict[int, Any]:
    """A logit bias by ids."""
    try:
        return bias_of_json(value)
    except LlorchError as error:
        raise refusal(error) from None
