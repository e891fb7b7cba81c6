"""Stop strings: found across token boundaries, and withheld from a stream until they are ruled out."""

from collections.abc import Sequence

from llorch_jax.errors import OptionError


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
        OptionError: one is empty or not a text.
    """
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence):
        raise OptionError(f"stop: expected a text or a list of texts, got {stop!r:.80}")
    for each in stop:
        if not isinstance(each, str) or not each:
            raise OptionError(f"stop: expected texts of one character or more, got {each!r:.80}")
    return tuple(stop)


class StopMatcher:
    """Watches a growing text, and releases what certainly comes before any stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.found: str | None = None
        self._withheld = ""

    def push(self, text: str) -> str:
        """The text that can be released after this text; `found` is set once a stop string is complete.

        Of several stop strings the one that is completed first counts, and of those the longest.
        """
        text = self._withheld + text
        places = {stop: text.find(stop) for stop in self.stops}
        ends = [(place + len(stop), place) for stop, place in places.items() if place >= 0]
        if ends:
            end, place = min(ends)
            self.found = text[place:end]
            self._withheld = ""
            return text[:place]
        certain = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        self._withheld = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The withheld text, at the end."""
        rest = self._withheld
        self._withheld = ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of a text that begin a stop string."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
