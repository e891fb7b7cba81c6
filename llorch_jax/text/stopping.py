"""Where a text ends: stop strings, across the borders of tokens, and withheld from a stream until ruled out."""

from collections.abc import Sequence

from llorch_jax.errors import SamplerError


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
        SamplerError: one is empty or no text.
    """
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for each in stops:
        if not isinstance(each, str) or not each:
            raise SamplerError(f"stop: expected texts of one character or more, got {each!r}")
    return stops


class StopMatcher:
    """Watches a text as it grows, and gives out what is certain to come before any stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.found: str | None = None
        self._withheld = ""

    def push(self, text: str) -> str:
        """What can be given out after this text; `found` is set where a stop string is complete.

        Of several stop strings that one counts which is complete first, and of those the longest.
        """
        self._withheld += text
        ends = [(place + len(stop), place) for stop in self.stops if (place := self._withheld.find(stop)) >= 0]
        if ends:
            end, place = min(ends)
            self.found, certain, self._withheld = self._withheld[place:end], self._withheld[:place], ""
            return certain
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        certain, self._withheld = (
            self._withheld[: len(self._withheld) - keep],
            self._withheld[len(self._withheld) - keep :],
        )
        return certain

    def flush(self) -> str:
        """What was withheld, at the end of the text."""
        rest, self._withheld = self._withheld, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the text are the start of a stop string."""
        sizes = range(min(len(stop) - 1, len(self._withheld)), 0, -1)
        return next((size for size in sizes if self._withheld.endswith(stop[:size])), 0)
