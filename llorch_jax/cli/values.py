"""Turns command-line arguments into values of settings: texts from files and standard input, token ids of words."""

import re
import sys
from typing import Any

from llorch_jax.errors import ConstraintError, SamplerError, TokenError
from llorch_jax.files import read_text


def text_or_stdin(argument: str) -> str:
    """The argument, or the contents of standard input if it is a dash.

    Raises:
        TokenError: standard input is closed or is not text.
    """
    if argument != "-":
        return argument
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise TokenError(f"standard input: expected {error.encoding} text ({error.reason})") from None
    except OSError as error:
        raise TokenError(f"standard input: cannot be read ({error.strerror})") from None


def resolve(settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Settings in the form that the library takes.

    Args:
        settings: as given on the command line.
        tokenizer: the model's tokenizer; None if it has none.

    Raises:
        ConstraintError: the file with a schema or grammar cannot be read.
        SamplerError: a bias is not ID=X.
    """
    found = dict(settings)
    if "json_schema" in found:
        found["json_schema"] = _text_or_file(
            "--json-schema", found["json_schema"], r"^\s*[{\[]", "the JSON of a schema"
        )
    if "grammar" in found:
        found["grammar"] = _text_or_file("--grammar", found["grammar"], r"::=|:\s|\n", "a grammar")
    if "logit_bias" in found:
        found["logit_bias"] = dict(map(_bias, found["logit_bias"]))
    if "early_stopping" in found:
        found["early_stopping"] = {"true": True, "false": False}.get(found["early_stopping"], found["early_stopping"])
    if "bad_words" in found and tokenizer is not None:
        texts = [start + text for text in found["bad_words"] for start in ("", " ")]
        found["bad_words"] = [tokenizer.encode(text) for text in texts]
    return found


def _text_or_file(option: str, argument: str, pattern: str, what: str) -> str:
    """The argument if it looks like the expected text, otherwise the contents of the file with this name."""
    if re.search(pattern, argument):
        return argument
    try:
        return read_text(argument, ConstraintError)
    except ConstraintError as error:
        raise ConstraintError(f"{option}: expected {what} or a file that contains it; {error}") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise SamplerError(f"--logit-bias: expected ID=X, a token's id and a number, got {text:.80}") from None
