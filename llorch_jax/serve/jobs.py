"""Turns the body of an HTTP request into requests to the engine, of which either all or none are queued."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llorch_jax.engine.slots import TOP_LOGPROBS
from llorch_jax.errors import EngineFullError, LlorchError
from llorch_jax.serve.bodies import MOST_SAMPLES, BadRequest, Fields, refusal
from llorch_jax.serve.templates import ChatTemplate, check_messages
from llorch_jax.text.engine import Engine, check_ids
from llorch_jax.text.handles import Handle
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.results import PromptLogprobs
from llorch_jax.tracing import is_whole

Prompt = str | list[int]
_DEFAULT_TOKENS = 16  # maximum number of new tokens of a completion, as in OpenAI's API
_LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
_BUSY = {"Retry-After": "1"}


@dataclasses.dataclass(frozen=True)
class Job:
    """The work that one HTTP request asks for.

    Attributes:
        prompts: prompts to continue.
        options: generation options for all prompts.
        samples: number of texts for each prompt.
        echoes: what the texts of each prompt begin with: the prompt as a text, or nothing.
        scored: whether the log-probabilities of the echoed prompts are shown, too.
        silent: whether the new tokens are left out.
        logprobs: number of alternatives to show with each token; None for no log-probabilities.
        stream: whether the answer is streamed.
        usage: whether a stream reports the usage at its end.
        priority, deadline, salt: as in `Engine.submit`.
        names: the names by which the body gives prompt and options, by our names.
    """

    prompts: Sequence[Prompt]
    options: GenerationOptions
    samples: int
    echoes: Sequence[str]
    scored: bool
    silent: bool
    logprobs: int | None
    stream: bool
    usage: bool
    priority: int
    deadline: float | None
    salt: str
    names: Mapping[str, str]

    def start(self, engine: Engine) -> list[Handle]:
        """Queues all texts.

        Raises:
            BadRequest: one of them cannot be queued; then none is.
        """
        handles: list[Handle] = []
        try:
            for prompt in self.prompts:
                for sample in range(self.samples):
                    handles.append(
                        engine.submit_checked(
                            prompt,
                            self.options,
                            priority=self.priority,
                            deadline=self.deadline,
                            cache_salt=self.salt,
                            sample=sample,
                        )
                    )
        except BaseException as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, EngineFullError):
                raise BadRequest(str(error), status=429, headers=_BUSY) from None
            if isinstance(error, LlorchError):
                raise refusal(error, self.names) from None
            raise
        return handles

    def scores(self, engine: Engine, wanted: Callable[[], bool]) -> list[PromptLogprobs | None]:
        """For each text the log-probabilities of its prompt's tokens, if they are shown, or None; see `Engine`.

        Raises:
            LlorchError: they cannot be computed.
        """
        found = [
            engine.prompt_logprobs(prompt, self.logprobs or 0, wanted=wanted) if self.scored else None
            for prompt in self.prompts
        ]
        return [each for each in found for _ in range(self.samples)]


def completion(engine: Engine, body: Mapping[str, Any], most_samples: int) -> Job:
    """The job for a body sent to /v1/completions.

    Raises:
        BadRequest: a field is missing, invalid or unknown.
    """
    # With an echo, a limit of 0 asks for the prompt alone. One token is then computed all the same, and left out.
    silent = [name for name in _LIMITS if body.get("echo") is True and is_whole(body.get(name)) and body[name] == 0]
    fields = Fields({**body, **dict.fromkeys(silent, 1)})
    prompts = _prompts(fields.take("prompt"))
    shown = fields.take("logprobs")
    if shown is not None:
        shown = fields_number("logprobs", shown)
    echo = fields.flag("echo")
    echoes = [_text(engine, prompt) if echo else "" for prompt in prompts]
    scored = echo and shown is not None
    return _job(
        engine, fields, prompts, echoes, shown, most_samples, _DEFAULT_TOKENS, scored=scored, silent=bool(silent)
    )


def chat(engine: Engine, template: ChatTemplate | None, body: Mapping[str, Any], most_samples: int) -> Job:
    """The job for a body sent to /v1/chat/completions.

    Raises:
        BadRequest: a field is missing, invalid or unknown, or the model has no chat template.
    """
    fields = Fields(body)
    messages = check_messages(fields.take("messages"))
    if template is None:
        raise BadRequest("messages: expected a model with a chat template, got one without; use /v1/completions")
    shown = 0 if fields.flag("logprobs") else None
    top = fields.number("top_logprobs", 0, 0, TOP_LOGPROBS)
    if top and shown is None:
        raise BadRequest(f"top_logprobs: expected logprobs with it, got {top} alone", "top_logprobs")
    prompt = template.render(messages)
    assert engine.model.tokenizer is not None
    try:
        ids = engine.model.tokenizer.encode(prompt)
    except LlorchError as error:
        raise refusal(error, {"text": "messages"}) from None
    room = max(engine.model.config.n_positions + 1 - len(ids), 1)
    return _job(engine, fields, [ids], [""], None if shown is None else top, most_samples, room, source="messages")


def fields_number(name: str, value: Any) -> int:
    """A number of alternatives."""
    return Fields({name: value}).number(name, 0, 0, TOP_LOGPROBS)


def _job(
    engine: Engine,
    fields: Fields,
    prompts: Sequence[Prompt],
    echoes: Sequence[str],
    logprobs: int | None,
    most_samples: int,
    default_tokens: int,
    *,
    source: str = "prompt",
    scored: bool = False,
    silent: bool = False,
) -> Job:
    samples = fields.number("n", 1, 1, MOST_SAMPLES)
    if samples * len(prompts) > most_samples:
        raise BadRequest(f"n: expected at most {most_samples} texts in all, got {samples * len(prompts)}", "n")
    best_of = fields.take("best_of", samples)
    if not is_whole(best_of) or best_of != samples:
        raise BadRequest(f"best_of: expected n={samples}, got {best_of!r:.40}", "best_of")
    stream = fields.flag("stream")
    extra = fields.take("stream_options", {})
    known = isinstance(extra, dict) and not set(extra) - {"include_usage", "include_obfuscation"}
    if not known or not all(each is None or isinstance(each, bool) for each in extra.values()):
        raise BadRequest(f"stream_options: expected include_usage, true or false, got {extra!r:.80}", "stream_options")
    job = Job(
        prompts=prompts,
        samples=samples,
        echoes=echoes,
        scored=scored,
        silent=silent,
        logprobs=logprobs,
        stream=stream,
        usage=bool(extra.get("include_usage")),
        priority=fields.number("priority", 0, -(2**31), 2**31),
        deadline=fields.take("deadline"),
        salt=fields.text("cache_salt"),
        options=fields.options(default_tokens, logprobs or 0, engine.model.config.eos_ids),
        names={"prompt": source, "text": source, **fields.names},
    )
    fields.end()
    return job


def _prompts(value: Any) -> list[Prompt]:
    """One or more prompts, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return value
        if all(isinstance(each, int) for each in value):
            return [value]
        if all(isinstance(each, list) for each in value):
            return value
    raise BadRequest(f"prompt: expected a text, token ids, or a list of either, got {value!r:.80}", "prompt")


def _text(engine: Engine, prompt: Prompt) -> str:
    """A prompt as a text; it is not encoded again, which could give other ids."""
    if isinstance(prompt, str):
        return prompt
    assert engine.model.tokenizer is not None
    try:
        return engine.model.tokenizer.decode(check_ids(prompt, engine.model.config.vocab_size))
    except LlorchError as error:
        raise refusal(error) from None
