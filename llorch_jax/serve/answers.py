"""Answers in the format of OpenAI's API."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from llorch_jax.text.handles import Handle
from llorch_jax.text.results import Generation, Piece, PromptLogprobs, TopLogprobs
from llorch_jax.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Echo:
    """What a text begins with.

    Attributes:
        text: the prompt, or nothing.
        scores: log-probabilities of its tokens, if they are shown.
        silent: whether nothing follows it.
    """

    text: str
    scores: PromptLogprobs | None = None
    silent: bool = False


class Places:
    """Where the tokens of one text begin, as numbers of characters; a character in progress is not counted."""

    def __init__(self, tokenizer: Tokenizer, echo: Echo) -> None:
        self._decoder = tokenizer.stream()
        self._next = len(echo.text)
        if echo.scores is not None:  # of which some may come before the text, as a begin-of-text token does
            self._next -= len(tokenizer.decode(echo.scores.token_ids))

    def take(self, id: int) -> int:
        """Where the text's next token begins."""
        place = max(self._next, 0)
        self._next += len(self._decoder.push(id))
        return place


class Format:
    """The format that all parts of one answer share; texts are completions or, in chat, messages.

    Attributes:
        chat: whether texts are messages.
        model: name of the model.
        logprobs: number of alternatives to show with every token; None to show no log-probabilities.
    """

    def __init__(self, tokenizer: Tokenizer, model: str, *, chat: bool, logprobs: int | None) -> None:
        self.chat = chat
        self.model = model
        self.logprobs = logprobs
        self._tokenizer = tokenizer
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, results: Sequence[Generation], echoes: Sequence[Echo], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer with whole texts, each preceded by an echo of its prompt or by nothing."""
        choices = []
        for index, (result, echo) in enumerate(zip(results, echoes, strict=True)):
            top: Sequence[TopLogprobs | None] = result.top_logprobs or [None] * len(result.token_ids)
            tokens: list[_Token] = list(zip(result.token_ids, result.logprobs, top, strict=True))
            tokens = _tokens_of(echo) + ([] if echo.silent else tokens)
            choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(tokens, self.places(echo))}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": result.text}
            else:
                choice["text"] = echo.text if echo.silent else echo.text + result.text
            reason = ("length", None) if echo.silent else (result.finish_reason, result.stop_reason)
            choices.append({**choice, "finish_reason": reason[0], "stop_reason": reason[1]})
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices, "usage": usage}

    def places(self, echo: Echo) -> Places:
        """Where the tokens of a text begin: those of its echo, if they are shown, and those that follow."""
        return Places(self._tokenizer, echo)

    def opening(self, index: int, echo: Echo, places: Places) -> dict[str, Any]:
        """The chunk of a stream before all new tokens."""
        part = self.part(index, echo.text)
        (choice,) = part["choices"]
        if echo.scores is not None:
            choice["logprobs"] = self._logprobs(_tokens_of(echo), places)
        if echo.silent:
            choice |= {"finish_reason": "length", "stop_reason": None}
        return part

    def part(self, index: int, text: str, found: tuple[Piece, Places] | None = None) -> dict[str, Any]:
        """A chunk of a stream: some text, and the token of a piece, if there is one, of the text with these places."""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": None}
        if found is not None:
            piece, places = found
            choice["finish_reason"] = piece.finish_reason
            choice["logprobs"] = self._logprobs([(piece.token_id, piece.logprob, piece.top_logprobs)], places)
            if piece.finish_reason is not None:
                choice["stop_reason"] = piece.stop_reason
        if self.chat:
            choice["delta"] = {"content": text} if found is not None else {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return {**self._chunk(), "choices": [choice]}

    def usage_part(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that was asked to report the usage."""
        return {**self._chunk(), "choices": [], "usage": usage}

    def _chunk(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _logprobs(self, tokens: "Sequence[_Token]", places: Places) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        if self.chat:
            return {
                "content": [
                    {**self._token(id, logprob), "top_logprobs": [self._token(*each) for each in top or []]}
                    for id, logprob, top in tokens
                ]
            }
        return {
            "tokens": [self._text(id) for id, _, _ in tokens],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [None if own is None else self._alternatives(top) for _, own, top in tokens],
            "text_offset": [places.take(id) for id, _, _ in tokens],
        }

    def _alternatives(self, top: TopLogprobs | None) -> dict[str, float]:
        return {self._text(id): logprob for id, logprob in top or []}

    def _text(self, id: int) -> str:
        """A token as text; like OpenAI's API, spells out its bytes where they are not whole characters."""
        text = self._tokenizer.decode([id])
        if _INCOMPLETE not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.bytes_of(id))

    def _token(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._text(id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.bytes_of(id)),
        }


_Token = tuple[int, float | None, TopLogprobs | None]  # id, log-probability and alternatives


def _tokens_of(echo: Echo) -> list[_Token]:
    """The tokens of a prompt that are shown."""
    if echo.scores is None:
        return []
    return list(zip(echo.scores.token_ids, echo.scores.logprobs, echo.scores.top_logprobs, strict=True))


def usage_of(handles: Sequence[Handle], samples: int, *, silent: bool = False) -> dict[str, Any]:
    """The token counts of some handles, of which each prompt has `samples`; without new tokens if they are left out."""
    prompt = sum(len(handle.prompt_ids) for handle in handles[::samples])
    completion = 0 if silent else sum(handle.count for handle in handles)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(handle.cached_tokens for handle in handles[::samples])},
    }


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {"message": _encodable(message), "type": kind, "param": param and _encodable(param), "code": status}
    }


def _encodable(text: str) -> str:
    """A text with half characters spelled out, which JSON can name and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
