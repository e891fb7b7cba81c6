"""Where a text ends and which part of it is shown: one rule for all methods of generation."""

import dataclasses
from typing import Literal

from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.stopping import StopMatcher
from llorch_jax.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
_INCOMPLETE = "\ufffd"  # the decoder's output for bytes that are not a whole character


@dataclasses.dataclass(frozen=True)
class Ending:
    """When a text ends.

    Attributes:
        ids: ids that end it.
        stops: stop strings.
        limit: maximum number of new tokens.
        whole_characters: whether a text that ends at the limit leaves out a character that is incomplete there, rather
            than showing it as U+FFFD.
    """

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    limit: int
    whole_characters: bool = False

    @classmethod
    def of(cls, model: Model, options: GenerationOptions, limit: int) -> "Ending":
        """The ending for a model's end-of-text ids and these options, after at most `limit` new tokens."""
        ids = tuple(dict.fromkeys((*model.config.eos_ids, *options.stop_ids)))
        return cls(ids, options.stop, limit, options.constraint is not None)


class Transcript:
    """A text as it grows, token by token.

    Attributes:
        token_ids: its tokens; the id that ended the text, or completed a stop string, is the last.
        text: the text returned so far.
        finish_reason: None while it grows.
        stop_reason: the id or the stop string that ended it.
    """

    def __init__(self, tokenizer: Tokenizer, ending: Ending) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._ending = ending
        self._decoder = tokenizer.stream()
        self._matcher = StopMatcher(ending.stops)

    def push(self, token: int, *, complete: bool = False) -> str:
        """Adds a token, and returns the text that it completes.

        Text that may become a stop string, and the bytes of an incomplete character, are withheld until they are
        certain or the text ends.

        Args:
            token: its id.
            complete: whether the text ends here, whatever the token is, as where a constraint allows nothing more.
        """
        self.token_ids.append(token)
        ends = token in self._ending.ids
        at_limit = len(self.token_ids) == self._ending.limit
        new = "" if ends else self._matcher.push(self._decoder.push(token))
        if self._matcher.found is None and (ends or complete or at_limit):
            new += self._flush(drop_incomplete=self._ending.whole_characters and not ends and not complete)
        if self._matcher.found is not None:
            self.finish_reason = "stop"
            self.stop_reason = self._matcher.found
        elif ends or complete:
            self.finish_reason = "stop"
            self.stop_reason = token if ends else None
        elif at_limit:
            self.finish_reason = "length"
        self.text += new
        return new

    def _flush(self, drop_incomplete: bool) -> str:
        """The withheld text."""
        rest = self._decoder.flush()
        if drop_incomplete:
            rest = rest.rstrip(_INCOMPLETE)
        return self._matcher.push(rest) + self._matcher.flush()
