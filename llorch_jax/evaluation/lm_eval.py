"""A model for the Language Model Evaluation Harness (EleutherAI's lm-eval), which is no dependency of this package.

`python -m llorch_jax.lm_eval --model llorch-jax --model_args pretrained=demo --tasks lambada_openai` runs the harness
with it, where that is installed; `register()` makes the name known to the harness in a program of one's own.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax

from llorch_jax.decoding.loop import stream_tokens
from llorch_jax.errors import LlorchError, TokenError
from llorch_jax.evaluation.loglikelihood import encode_pair, first_token, score_continuations
from llorch_jax.loading.checkpoint import Model, load
from llorch_jax.sampling import make_sampler
from llorch_jax.text.vocabulary import tokenizer_of

NAME = "llorch-jax"


class Instance(Protocol):
    """A request of the harness."""

    args: tuple[Any, ...]


class HarnessModel:
    """The requests of the harness' interface `lm_eval.api.model.LM`, answered by a model of this package."""

    def __init__(self, pretrained: str | Model = "demo", max_gen_toks: int = 256, **_: Any) -> None:
        """Loads a model.

        Args:
            pretrained: demo, a directory in Hugging Face's layout, a hub id, or a model.
            max_gen_toks: how many tokens are generated at most where a task does not say.
            _: what the harness passes to every model, such as batch_size and device; without effect.
        """
        super().__init__()
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained)
        self.max_gen_toks = int(max_gen_toks)
        self._tokenizer = tokenizer_of(self.model)

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self.model.config.n_positions

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its stored requests after."""
        return self.model.name

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each (context, continuation), and whether greedy decoding would write the continuation.

        Requests of the same context share its cache. Contexts that are too long lose their first tokens.

        Raises:
            TokenError: a continuation has no tokens or more than the model's context.
        """
        first = first_token(self.model.config)
        pairs = [encode_pair(self._tokenizer, request.args[0], request.args[1], first) for request in requests]
        results = self._score([self._shortened(*pair) for pair in pairs])
        for request, result in zip(requests, results, strict=True):
            self._remember("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-probability of each (text,), read in windows that do not overlap, as the harness defines it."""
        results = []
        for request in requests:
            windows = rolling_windows(self._tokenizer.encode(request.args[0]), self._first(), self.max_length)
            results.append(sum(total for total, _ in self._score(list(windows))))
            self._remember("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """A continuation of each (context, settings), up to the first of the strings `settings["until"]`."""
        results = []
        for number, request in enumerate(requests):
            context, settings = request.args
            results.append(self._continue(context, settings, jax.random.fold_in(jax.random.key(0), number)))
            self._remember("generate_until", request.args, results[-1])
        return results

    def _remember(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
        """Shows a result to the harness' store of results; there is none without the harness."""

    def _first(self) -> int:
        first = first_token(self.model.config)
        if first is None:
            raise TokenError(f"model {self.model.name}: expected a begin-of-text or end-of-text token, got none")
        return first

    def _shortened(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The pair with as much of the context as fits; the last token of the continuation needs no position."""
        if not 1 <= len(continuation) <= self.max_length:
            raise TokenError(f"continuation: expected 1 .. {self.max_length} tokens, got {len(continuation)}")
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each (context, continuation), equal contexts together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(pairs):
            groups.setdefault(tuple(context), []).append(i)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for shared, members in groups.items():
            continuations = [pairs[i][1] for i in members]
            found = score_continuations(self.model.params, self.model.config, shared, continuations)
            for i, (logprobs, greedy) in zip(members, found, strict=True):
                results[i] = float(logprobs.sum(dtype=float)), greedy
        return results

    def _continue(self, context: str, settings: dict[str, Any], key: jax.Array) -> str:
        limit = min(int(settings.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1)
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        sampler = make_sampler(temperature, top_k=settings.get("top_k"), top_p=settings.get("top_p"))
        ids = (self._tokenizer.encode(context) or [self._first()])[-(self.max_length - limit) :]
        eos_ids = self.model.config.eos_ids
        decoder, text = self._tokenizer.stream(), ""
        for token in stream_tokens(
            self.model.params, self.model.config, [ids], limit, sampler=sampler, key=key, eos_id=eos_ids
        ):
            if int(token[0]) in eos_ids:
                break
            text += decoder.push(int(token[0]))
            if any(stop in text for stop in stops):
                return _until(text, stops)
        return _until(text + decoder.flush(), stops)


def rolling_windows(ids: list[int], first: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts and continuations that cover a text once, each window as full as possible.

    Args:
        ids: of the text.
        first: the token before the text.
        size: tokens that the model reads at once.

    Yields:
        Pairs of which the context has one token or more, and both together have at most size + 1.
    """
    if ids:
        yield [first], ids[:size]
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        yield ids[end - size - 1 : start], ids[start:end]


def register() -> type[HarnessModel]:
    """Makes the model name `llorch-jax` known to the harness, and returns the class behind it.

    Raises:
        LlorchError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise LlorchError(f"lm-eval: expected the evaluation harness; install the package lm-eval ({error})") from None

    class LlorchJax(HarnessModel, LM):
        def _remember(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
            self.cache_hook.add_partial(kind, args, result)

    register_model(NAME)(LlorchJax)
    return LlorchJax


def main() -> None:
    """Runs the harness' command line with this model known to it."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _until(text: str, stops: list[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


if __name__ == "__main__":
    main()
