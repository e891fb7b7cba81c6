"""Answers in the format of OpenAI's API."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from llorch_jax.text.handles import Handle
from llorch_jax.text.results import Generation, Piece, TopLogprobs
from llorch_jax.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class Places:
    """Where the tokens of one text begin, as numbers of characters; a character in progress is not counted."""

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        self._decoder = tokenizer.stream()
        self._next = start

    def take(self, id: int) -> int:
        """Where the text's next token begins."""
        place = self._next
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

    def whole(self, results: Sequence[Generation], echoes: Sequence[str], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer with whole texts, each preceded by an echo of its prompt or by nothing."""
        choices = []
        for index, (result, echo) in enumerate(zip(results, echoes, strict=True)):
            top: Sequence[TopLogprobs | None] = result.top_logprobs or [None] * len(result.token_ids)
            tokens = list(zip(result.token_ids, result.logprobs, top, strict=True))
            choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(tokens, self.places(echo))}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": result.text}
            else:
                choice["text"] = echo + result.text
            choices.append({**choice, "finish_reason": result.finish_reason, "stop_reason": result.stop_reason})
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices, "usage": usage}

    def places(self, echo: str) -> Places:
        """Where the tokens of a text begin that follow an echo of the prompt or nothing."""
        return Places(self._tokenizer, len(echo))

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

    def _logprobs(
        self, tokens: Sequence[tuple[int, float, TopLogprobs | None]], places: Places
    ) -> dict[str, Any] | None:
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
            "top_logprobs": [{self._text(id): logprob for id, logprob in top or []} for _, _, top in tokens],
            "text_offset": [places.take(id) for id, _, _ in tokens],
        }

    def _text(self, id: int) -> str:
        """A token as text; like OpenAI's API, spells out its bytes where they are not whole characters."""
        text = self._tokenizer.decode([id])
        if _INCOMPLETE not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.bytes_of(id))

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text(id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.bytes_of(id)),
        }


def usage_of(handles: Sequence[Handle], samples: int) -> dict[str, Any]:
    """The token counts of some handles, of which each prompt has `samples`."""
    prompt = sum(len(handle.prompt_ids) for handle in handles[::samples])
    completion = sum(handle.count for handle in handles)
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
