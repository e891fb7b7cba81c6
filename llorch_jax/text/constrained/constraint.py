"""What a text must match: descriptions of constraints, without the machinery that enforces them (`matching`)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llorch_jax.errors import ConstraintError
from llorch_jax.files import parse_json

Kind = Literal["regex", "json_schema", "grammar", "choices"]


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a whole text must match. Make one with a class method; equal descriptions are equal.

    Whether it is valid is checked when a model first uses it.

    Attributes:
        kind: which class method made it.
        source: the pattern or grammar; JSON of a schema or of choices.
    """

    kind: Kind
    source: str

    @classmethod
    def regex(cls, pattern: str) -> "Constraint":
        """A regular expression for the whole text, in the syntax of Rust's regex crate: no look-around, no
        back-references."""
        return cls("regex", _text("regex", pattern))

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> "Constraint":
        """A JSON schema (draft 2020-12), as a mapping or its JSON; {} is any JSON value.

        Properties come in the order of the schema. Separators are those of Python's `json.dumps`, without further
        whitespace, unless the schema's key "x-guidance" says otherwise.
        """
        if isinstance(schema, Mapping):
            try:
                return cls("json_schema", json.dumps(schema))
            except (TypeError, ValueError) as error:
                raise ConstraintError(f"json_schema: expected values that JSON has ({error})") from None
            except RecursionError:
                raise ConstraintError("json_schema: expected a schema that is nested less deeply") from None
        source = _text("json_schema", schema, "a mapping or a str")
        try:
            known = isinstance(parse_json(source), dict)
        except ValueError:
            known = False
        if not known:
            raise ConstraintError(f"json_schema: expected the JSON of an object, got {source[:60]!r}")
        return cls("json_schema", source)

    @classmethod
    def grammar(cls, text: str) -> "Constraint":
        """A context-free grammar, in llguidance's dialect of Lark (with a rule `start`) or in llama.cpp's GBNF (with a
        rule `root`)."""
        return cls("grammar", _text("grammar", text))

    @classmethod
    def choices(cls, texts: Sequence[str]) -> "Constraint":
        """One of these texts."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise ConstraintError(f"choices: expected one text or more, got {texts!r:.80}")
        for text in texts:
            if not _text("choices", text, "texts"):
                raise ConstraintError("choices: expected texts of one character or more, got ''")
        return cls("choices", json.dumps(list(texts)))


KINDS: tuple[Kind, ...] = ("regex", "json_schema", "grammar", "choices")
Constraints = Constraint | Sequence[Constraint | None]
_MAKERS: dict[str, Any] = {
    "regex": Constraint.regex,
    "json_schema": Constraint.json_schema,
    "grammar": Constraint.grammar,
    "choices": Constraint.choices,
}


def take_constraint(settings: dict[str, Any]) -> Constraints | None:
    """The constraint among the settings of a generation, which is taken out of them.

    Raises:
        ConstraintError: there are several, or one of the wrong type.
    """
    names = ("constraint", *KINDS)
    given = {name: value for name in names if (value := settings.pop(name, None)) is not None}
    if len(given) > 1:
        raise ConstraintError(f"constraints: expected one of {', '.join(names)}, got {' and '.join(given)}")
    for name, value in given.items():
        return _MAKERS[name](value) if name in _MAKERS else value
    return None


def per_row(constraints: Constraints, batch: int) -> list[Constraint | None]:
    """One constraint, or None, for each row of a batch.

    Raises:
        ConstraintError: they are of the wrong type, or not as many as rows.
    """
    if isinstance(constraints, Constraint):
        return [constraints] * batch
    if isinstance(constraints, str) or not isinstance(constraints, Sequence):
        raise ConstraintError(f"constraint: expected a Constraint or a list of them, got {constraints!r:.80}")
    if len(constraints) != batch:
        raise ConstraintError(f"constraint: expected one per prompt, {batch}, got {len(constraints)}")
    for row, each in enumerate(constraints):
        if each is not None and not isinstance(each, Constraint):
            raise ConstraintError(f"constraint {row}: expected a Constraint or None, got {each!r:.80}")
    return list(constraints)


def _text(name: str, value: Any, expected: str = "a str") -> str:
    if not isinstance(value, str):
        raise ConstraintError(f"{name}: expected {expected}, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{name}: expected text that UTF-8 can encode ({error})") from None
    return value
