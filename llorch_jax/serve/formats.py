"""The fields by which OpenAI's API and vLLM ask for texts of a certain form, as constraints."""

from typing import Any

from llorch_jax.text.constrained.constraint import Kind

Form = tuple[Kind, Any]  # the kind of a constraint and its source, not yet checked
_ANY_OBJECT = {"type": "object"}
# vLLM's names, in `structured_outputs` and, in older versions, after "guided_".
_KINDS: dict[str, Kind] = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}
GUIDED: dict[str, Kind] = {f"guided_{name}": kind for name, kind in _KINDS.items()}


def response_format(value: Any) -> Form | None:
    """OpenAI's `response_format`: text, any JSON object, or JSON that matches a schema.

    Raises:
        ValueError: it is something else; the message says what was expected.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return "json_schema", _ANY_OBJECT
    if kind != "json_schema":
        raise ValueError(f"expected the type text, json_object or json_schema, got {value!r:.80}")
    given = value.get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise ValueError(f'expected {{"json_schema": {{"schema": an object}}}} with this type, got {given!r:.80}')
    return "json_schema", schema


def structured_outputs(value: Any) -> Form | None:
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar and json_object.

    Raises:
        ValueError: it is something else; the message says what was expected.
    """
    expected = f"expected one of {', '.join(_KINDS)} and json_object"
    if not isinstance(value, dict):
        raise ValueError(f"{expected}, got {value!r:.80}")
    given = {name: found for name, found in value.items() if found is not None and found is not False}
    if len(given) != 1:
        raise ValueError(f"{expected}, got {' and '.join(given)[:80] or 'none'}")
    ((name, source),) = given.items()
    if name == "json_object" and source is True:
        return "json_schema", _ANY_OBJECT
    if name not in _KINDS:
        raise ValueError(f"{expected}, got {name!a:.40}")
    return _KINDS[name], source
