"""The jobs in a file of prompts: each line is checked completely before anything runs."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llorch_jax.cache.base import KVCache
from llorch_jax.decoding.overflow import Reencode, check_overflow
from llorch_jax.errors import BatchFileError, CapacityError, ConstraintError, LlorchError, OptionError
from llorch_jax.files import read_text
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import Sampling, bias_of_json, check_sampler
from llorch_jax.sampling.masking import Masked
from llorch_jax.sampling.settings import rows_of
from llorch_jax.text.constrained.constraint import KINDS, Constraint
from llorch_jax.text.ending import Ending
from llorch_jax.text.options import GenerationOptions
from llorch_jax.text.prompts import encode_prompts
from llorch_jax.text.vocabulary import tokenizer_of

_OWN = ("prompt", "id")
INVALID = (LlorchError, TypeError, ValueError, OverflowError)  # what an invalid value raises


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the input.

    Attributes:
        line: its number among the lines that are not blank, from 1.
        id: the line's id, or None.
        prompt: the text to continue.
        settings: the settings of the file, overridden by those of the line.
    """

    line: int
    id: Any
    prompt: str
    settings: dict[str, Any]

    @cached_property
    def options(self) -> GenerationOptions:
        """The settings, checked."""
        return GenerationOptions.create(**self.settings)

    def hash(self, weights: str) -> str:
        """A hash of everything on which the result depends; `weights` is the model's fingerprint."""
        content = [weights, self.line, self.id, self.prompt, self.settings]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


class JobReader:
    """Reads and checks jobs for one model."""

    def __init__(self, model: Model, settings: Mapping[str, Any]) -> None:
        """A reader for lines whose settings are added to these.

        Raises:
            LlorchError: a setting is invalid, or cannot be used for a file.
        """
        self._model = model
        self._settings = dict(settings)
        self._capacities: dict[Any, int] = {}
        check_settings(settings)

    def read(self, source: Path) -> list[Job]:
        """The jobs of a file.

        Raises:
            BatchFileError: the file cannot be read, or a line is invalid; the message names line and field.
        """
        lines = read_text(source, BatchFileError).split("\n")  # splitlines would split at U+2028, too
        jobs: list[Job] = []
        for number, text in enumerate(lines, 1):
            if text.strip():
                try:
                    jobs.append(self.job(len(jobs) + 1, _parse(text)))
                except INVALID as error:
                    raise BatchFileError(f"{source}: line {number}: {error}") from None
        return jobs

    def job(self, line: int, given: Mapping[str, Any]) -> Job:
        """The job of an object with a prompt, as a line has it.

        Raises:
            INVALID: a value is not as described, or does not fit the model.
        """
        for name, value in given.items():
            _check_writable(name, value)
        own = {name: value for name, value in given.items() if name not in _OWN}
        if isinstance(own.get("logit_bias"), dict):
            own["logit_bias"] = bias_of_json(own["logit_bias"])
        settings = dict(self._settings)
        if any(name in own for name in KINDS):  # a line's constraint takes the place of the file's
            settings = {name: value for name, value in settings.items() if name not in (*KINDS, "constraint")}
        job = Job(line, given.get("id"), given["prompt"], settings | own)
        self._check(job)
        return job

    def _check(self, job: Job) -> None:
        options, config = job.options, self._model.config
        for name in ("seed", "max_new_tokens"):
            if isinstance(getattr(options, name), tuple):
                raise OptionError(f"{name}: expected one whole number, got {getattr(options, name)!r:.80}")
        options.check_method(options.method)
        options.check_model(self._model)
        sampler: Any = options.sampler_for(self._model)
        _check_rows(options, sampler)
        check_sampler(sampler, config.vocab_size)
        if options.constraint is not None:
            self._check_constraint(options)
        (ids,) = encode_prompts(self._model, [job.prompt])
        self._check_room(len(ids), options)

    def _check_constraint(self, options: GenerationOptions) -> None:
        constraint = options.constraint
        if not isinstance(constraint, Constraint):
            raise ConstraintError(f"constraint: expected one Constraint with a file of prompts, got {constraint!r:.80}")
        from llorch_jax.text.constrained.matching import compiler_of

        eos_ids = Ending.of(self._model, options, 1).ids
        compiler = compiler_of(tokenizer_of(self._model), self._model.config.vocab_size, eos_ids)
        compiler.matcher(constraint, eos_ids)

    def _check_room(self, count: int, options: GenerationOptions) -> None:
        """Raises CapacityError if a prompt of `count` tokens and its new ones do not fit."""
        context = self._capacity(options)
        (limit,) = options.limits(1)
        reencode = check_overflow(options.overflow)
        if reencode is not None:
            reencode.kept(np.zeros(context + 1, np.int32), context)
            return
        last = 1 if options.method == "contrastive search" else 0  # which feeds its last token as well
        if count + limit - 1 + last > context:
            raise CapacityError(
                f"prompt and max_new_tokens: expected both within the context of {context}, got {count} and {limit} "
                "tokens"
            )

    def _capacity(self, options: GenerationOptions) -> int:
        """The number of tokens that a row of the options' cache can hold; nothing is allocated."""
        kind = (options.cache, options.codec, options.residual)
        if kind not in self._capacities:
            context = self._model.config.n_positions
            shapes: Any = jax.eval_shape(lambda: options.fitted_cache(self._model.config, 1, context))
            self._capacities[kind] = min(shapes.capacity, context)
        return self._capacities[kind]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises LlorchError for a setting that is invalid, or cannot be used for a file."""
    if settings.get("sampler") is not None:
        raise OptionError("sampler: expected none with a file of prompts, whose settings are written down")
    if isinstance(settings.get("cache"), KVCache):
        raise OptionError("cache: expected the name of a layout with a file of prompts, got a cache")
    options = GenerationOptions.create(**settings)
    options.check_method(options.method)


def _parse(text: str) -> dict[str, Any]:
    """The object on a line.

    Raises:
        BatchFileError: it is not a JSON object with a prompt.
    """
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise BatchFileError(f"expected a JSON object ({error})") from None
    except RecursionError:
        raise BatchFileError("expected a JSON object, got one that is nested too deeply") from None
    except ValueError:  # of integers with more digits than Python converts
        raise BatchFileError("expected a JSON object, got one with a number of too many digits") from None
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise BatchFileError('expected a JSON object with a text as "prompt"')
    return given


def _check_writable(name: str, value: Any) -> None:
    """Raises BatchFileError for a value that cannot be written as JSON in UTF-8."""
    try:
        json.dumps([name, value], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BatchFileError(f"{name!a:.60}: expected text that UTF-8 can encode, got a lone surrogate") from None
    except ValueError:
        raise BatchFileError(f"{name}: expected finite numbers, got NaN or infinity") from None
    except RecursionError:
        raise BatchFileError(f"{name}: expected a value that is nested less deeply") from None


def _check_rows(options: GenerationOptions, sampler: Any) -> None:
    """Raises OptionError for a setting that has a value for each row of a batch: a line is one row."""
    plain = {"temperature": options.temperature, "top_k": options.sampling.get("top_k")}
    plain |= {"top_p": options.sampling.get("top_p")}
    counts = {name: np.size(value) for name, value in plain.items() if value is not None}
    inner = sampler.sampler if isinstance(sampler, Masked) else sampler
    more = inner.more if isinstance(inner, Sampling) else {}
    counts |= {name: rows_of(value) for name, value in more.items()}
    for name, count in counts.items():
        if count != 1:
            raise OptionError(f"{name}: expected one value, got {count}")


def _plain(value: Any) -> Any:
    """A stand-in for an option's value in a hash, if JSON has no such value."""
    if isinstance(value, Reencode | Constraint):
        return [type(value).__name__, dataclasses.asdict(value)]
    if isinstance(value, type):
        return value.__name__
    raise OptionError(f"settings: expected values that JSON has, got a {type(value).__name__}")
