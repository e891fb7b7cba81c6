"""Jinja's sandbox with limits: a template ends in time, and makes no more text than a prompt can have.

Jinja's own sandbox keeps a template from the rest of the program. This one also counts: the time at every turn of a
loop and every call, the length of the text, and the size of products, powers and sums. It is meant for faulty
templates. Whoever chooses a model chooses its template too, and may still write one that takes much memory.
"""

import contextvars
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SECONDS = 2.0
MOST_CHARACTERS = 1 << 22
_MOST_BITS = 1 << 12  # of a whole number

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates `compiled` makes and `rendered` runs."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.filters[_TURNS] = _turns
        del self.globals["lipsum"]

    def compiled(self, source: str) -> Template:
        """A template whose loops are counted.

        Raises:
            Exception: the source is not a template; beside Jinja's own errors these are RecursionError and SyntaxError,
                for one that is nested too deeply for Python.
        """
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _TURNS, [], [], None, None, lineno=loop.lineno)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in a template."""
        _check_time()
        if isinstance(function, LoopContext) and args:  # a recursive loop calls itself with what it is to go through
            args = (_turns(args[0]), *args[1:])
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """A sum, a product or a power in a template."""
        size, bits = 0, 0
        if operator == "+":
            size = _length(left) + _length(right)
        elif operator == "*":
            size = max(_length(left) * _count(right), _length(right) * _count(left))
            bits = _count(left).bit_length() + _count(right).bit_length()
        else:
            bits = _count(left).bit_length() * _count(right)
        if size > MOST_CHARACTERS or bits > _MOST_BITS:
            limits = f"{MOST_CHARACTERS:,} characters or items and {_MOST_BITS:,} bits"
            raise SecurityError(f"expected the result of {operator} within {limits}, got more")
        return super().call_binop(context, operator, left, right)


def rendered(template: Template, values: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises:
        Exception: whatever the template raises, and SecurityError for more time or text than the limits.
    """
    token = _deadline.set(time.monotonic() + MOST_SECONDS)
    try:
        parts, length = [], 0
        for part in template.generate(**values):
            parts.append(part)
            length += len(part)
            if length > MOST_CHARACTERS:
                raise SecurityError(f"expected at most {MOST_CHARACTERS:,} characters, got more")
        return "".join(parts)
    finally:
        _deadline.reset(token)


def _turns(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop."""
    for item in items:
        _check_time()
        yield item


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"expected a text within {MOST_SECONDS:g} s, got none")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


_TURNS = "turns of a loop"  # no name that a template could use
