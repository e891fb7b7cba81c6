"""A model for the Language Model Evaluation Harness (EleutherAI's lm-eval), which is not a dependency.

`python -m llorch_jax.lm_eval --model llorch-jax --model_args pretrained=demo --tasks lambada_openai` runs the harness
with it, where that is installed; `register()` makes the name known to the harness in your own program.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from llorch_jax.errors import LlorchError, OptionError, TokenError
from llorch_jax.evaluation.loglikelihood import ROWS, encode_pair, first_token, score_pairs
from llorch_jax.loading.checkpoint import Model, load
from llorch_jax.text.generation import continue_texts
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.vocabulary import known_ids, tokenizer_of

NAME = "llorch-jax"
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWING = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "top_n_sigma",
    "epsilon_cutoff",
    "eta_cutoff",
    "xtc_probability",
    "xtc_threshold",
    "mirostat_tau",
    "mirostat_eta",
)
_log = logging.getLogger(__name__)


class Instance(Protocol):
    """A request of the harness."""

    args: tuple[Any, ...]


class HarnessModel:
    """The requests of the harness' interface `lm_eval.api.model.LM`, answered by a model of this package."""

    def __init__(
        self,
        pretrained: str | Model = "demo",
        max_gen_toks: int | str = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        weights: str = "float32",
        revision: str | None = None,
        **unknown: Any,
    ) -> None:
        """Loads a model.

        Args:
            pretrained: demo, a directory in Hugging Face's layout, a hub id, or a model.
            max_gen_toks: maximum number of new tokens for tasks that do not set it.
            batch_size: maximum number of requests that run at once; None and "auto" for 8.
            max_batch_size: maximum batch size that "auto" may choose.
            device: "cpu" or None.
            weights: how they are kept in memory; see `load`.
            revision: of a hub repository; see `load`.
            unknown: anything else is refused by name.

        Raises:
            LlorchError: an argument is unknown or invalid, or the model cannot be loaded.
        """
        super().__init__()
        if unknown:
            known = "pretrained, max_gen_toks, batch_size, max_batch_size, device, weights, revision"
            raise OptionError(f"model_args: expected {known}; got {', '.join(unknown)}")
        if device not in (None, "cpu"):
            raise OptionError(f"device: expected cpu, got {device!r:.80}")
        self.max_gen_toks = _count("max_gen_toks", max_gen_toks)
        self.batch_size = _batch_size(batch_size, max_batch_size)
        if not isinstance(pretrained, Model):
            pretrained = load(pretrained, weights=weights, revision=revision)
        self.model = pretrained
        self._tokenizer = tokenizer_of(self.model)

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self.model.config.n_positions

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness stores requests."""
        return self.model.name

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each (context, continuation), and whether greedy decoding would write the continuation.

        Requests with the same context share its cache. Contexts that are too long lose their first tokens, and a
        continuation that is longer than the model's context is read in windows; a warning says so.
        """
        first = first_token(self.model.config)
        parts: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            context, continuation = encode_pair(self._tokenizer, request.args[0], request.args[1], first)
            if len(continuation) > self.max_length:
                _log.warning("request %d: %d tokens to score, more than the context", number, len(continuation))
                windows = rolling_windows(continuation, context[-1], self.max_length)
                parts += [(number, *window) for window in windows]
            elif continuation:
                room = self.max_length + 1 - len(continuation)
                if len(context) > room:
                    _log.info("request %d: the first %d tokens of the context left out", number, len(context) - room)
                parts.append((number, context[-room:], continuation))
        results = self._score("loglikelihood", len(requests), parts, disable_tqdm)
        for request, result in zip(requests, results, strict=True):
            self._remember("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each (text,), read in windows that do not overlap, as the harness defines it."""
        parts = []
        for number, request in enumerate(requests):
            windows = rolling_windows(self._tokenizer.encode(request.args[0]), self._first(), self.max_length)
            parts += [(number, *window) for window in windows]
        results = [total for total, _ in self._score("loglikelihood_rolling", len(requests), parts, disable_tqdm)]
        for request, result in zip(requests, results, strict=True):
            self._remember("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each (context, settings), up to the first of the strings `settings["until"]`.

        A context that leaves no room for max_gen_toks loses its first tokens, as in the harness' own models. But where
        max_gen_toks is more than half of the model's context, the context is kept and the generation is shortened. A
        warning says so in both cases.

        Raises:
            OptionError: a setting is unknown or invalid; it is raised before anything runs.
        """
        jobs: list[tuple[GenerationOptions, list[tuple[int, list[int], int]]]] = []
        for number, request in enumerate(requests):
            context, settings = request.args
            ids = self._tokenizer.encode(context) or [self._first()]
            options = options_of(settings, self.max_gen_toks)
            ids, limit = self._fitted(number, ids, options.limits(1)[0])
            members = next((members for known, members in jobs if known == options), None)
            if members is None:
                members = []
                jobs.append((options, members))
            members.append((number, ids, limit))
        results = [""] * len(requests)
        with _bar("generate_until", len(requests), disable_tqdm) as progress:
            for options, members in jobs:
                members.sort(key=lambda member: -len(member[1]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    numbers = tuple(number for number, _, _ in batch)
                    limits = tuple(limit for _, _, limit in batch)
                    own = dataclasses.replace(options, seed=numbers, max_new_tokens=limits)
                    outputs = continue_texts(self.model, [ids for _, ids, _ in batch], own)
                    for number, out in zip(numbers, outputs, strict=True):
                        results[number] = out.text
                        self._remember("generate_until", requests[number].args, out.text)
                    progress(len(batch))
        return results

    def _remember(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
        """Passes a result to the harness's cache of results, if the harness is installed."""

    def _first(self) -> int:
        first = first_token(self.model.config)
        if first is None:
            raise TokenError(f"model {self.model.name}: expected a begin-of-text or end-of-text token, got none")
        return first

    def _fitted(self, number: int, ids: list[int], wanted: int) -> tuple[list[int], int]:
        """A context and a number of new tokens that fit the model's, by the rule that `generate_until` states."""
        room = self.max_length + 1 - wanted if wanted <= self.max_length // 2 else self.max_length
        if len(ids) > room:
            _log.warning("request %d: the first %d tokens of the context left out", number, len(ids) - room)
            ids = ids[-room:]
        most = self.max_length + 1 - len(ids)
        if wanted > most:
            _log.warning("request %d: at most %d new tokens, as the context has no room for %d", number, most, wanted)
        return ids, min(wanted, most)

    def _score(
        self, kind: str, count: int, parts: list[tuple[int, list[int], list[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of `count` requests from parts (request, context, continuation) of them."""
        totals = [0.0] * count
        greedy = [True] * count
        with _bar(kind, len(parts), disable_tqdm) as progress:
            found = score_pairs(
                self.model.params,
                self.model.config,
                [(context, continuation) for _, context, continuation in parts],
                batch_size=self.batch_size,
                allowed=known_ids(self._tokenizer, self.model.config.vocab_size),
                progress=progress,
            )
        for (number, _, _), (logprobs, is_greedy) in zip(parts, found, strict=True):
            totals[number] += float(logprobs.sum(dtype=float))
            greedy[number] &= is_greedy
        return list(zip(totals, greedy, strict=True))


def options_of(settings: dict[str, Any], max_gen_toks: int) -> GenerationOptions:
    """The options for a task's generation settings, by the rules of the harness.

    Args:
        settings: of the task: until, max_gen_toks (or max_new_tokens, max_tokens, max_completion_tokens), do_sample,
            temperature, and any sampling setting of `GenerationOptions`. Without do_sample, tokens are drawn where the
            temperature is above 0. Settings of the sampler are of no effect where no token is drawn.
        max_gen_toks: where the task does not say.

    Raises:
        OptionError: a setting is unknown or invalid.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    lengths = [given.pop(name) for name in _LENGTHS if name in given]
    until = given.pop("until", [])
    if not isinstance(until, str | list | tuple):
        raise OptionError(f"until: expected a text or a list of texts, got {until!r:.80}")
    stops = [until] if isinstance(until, str) else list(until)
    temperature = _number("temperature", given.pop("temperature", 1.0 if given.get("do_sample") else 0.0))
    draws = bool(given.pop("do_sample", temperature > 0)) and temperature > 0
    if not draws:
        given = {name: value for name, value in given.items() if name not in _DRAWING}
    return GenerationOptions.create(
        max_new_tokens=_count("max_gen_toks", lengths[0] if lengths else max_gen_toks),
        temperature=temperature if draws else 0.0,
        stop=[stop for stop in stops if stop],
        **given,
    )


def rolling_windows(ids: list[int], first: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts and continuations that cover a text once, each window as full as possible.

    Args:
        ids: token ids of the text.
        first: the token before the text.
        size: number of tokens that the model reads at once.

    Yields:
        Pairs whose context has at least one token, with at most size + 1 tokens in both together.
    """
    if ids:
        yield [first], ids[:size]
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        yield ids[end - size - 1 : start], ids[start:end]


def register() -> type[HarnessModel]:
    """Makes the model name `llorch-jax` known to the harness, and returns the class.

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


def _count(name: str, value: int | str) -> int:
    """A whole number from 1 up, which the harness may give as text."""
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise OptionError(f"{name}: expected a whole number from 1 up, got {value!r:.80}")
    return count


def _number(name: str, value: float | str) -> float:
    """A number, which the harness may give as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name}: expected a number, got {value!r:.80}") from None


def _batch_size(batch_size: int | str | None, most: int | str | None) -> int:
    """The number of requests per batch: "auto" and "auto:N" leave the choice to the model."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return ROWS if most is None else min(ROWS, _count("max_batch_size", most))
    return _count("batch_size", batch_size)


@contextmanager
def _bar(kind: str, total: int, disabled: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar if tqdm is installed, as it is with the harness; yields a function of the number done."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, desc=f"Running {kind} requests", disable=disabled) as bar:
        yield bar.update


if __name__ == "__main__":
    main()
