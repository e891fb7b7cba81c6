"""Prompts from a file of JSON lines, results to another, in batches; a run that was stopped goes on where it was.

A line of the input is an object with "prompt" and, as it likes, "id" and settings of `generate` that differ from the
run's. Neighbours with equal settings share a batch. Each prompt has a seed of its own, so it gets what it would get
alone. A batch's results are on the disk before the next begins; a line of the output carries a hash of its job, by
which a later run knows it again.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from llorch_jax.errors import BatchFileError, LlorchError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.sampling import make_sampler
from llorch_jax.text.generation import generate
from llorch_jax.text.results import Generation, tokenizer_of

_LENGTH = "max_new_tokens"
_OWN = ("prompt", "id")
_HOW = ("seed", "cache", "overflow", "stop", "stop_ids", "top_logprobs", _LENGTH)  # other settings are the sampler's


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the input: its number from 1, its id if it has one, the prompt, and all settings."""

    line: int
    id: Any
    prompt: str
    settings: dict[str, Any]

    def hash(self, model: str) -> str:
        """Of all that the result depends on."""
        content = json.dumps([model, self.line, self.id, self.prompt, self.settings], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def generate_file(
    model: Model,
    source: Path,
    target: Path,
    *,
    batch_size: int = 8,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> int:
    """Continues all prompts of a file.

    Args:
        model: from `load`.
        source: JSON lines.
        target: JSON lines, one per prompt, in their order: line, id, prompt, text, finish_reason, stop_reason,
            prompt_tokens, token_ids, job. Lines that are there already are kept, a half-written last one is not.
        batch_size: at most so many prompts at once. A run that goes on makes the same batches.
        overwrite: whether to start anew.
        progress: is told how many are done, of how many.
        settings: of `generate`, for lines that have none of their own.

    Returns:
        How many prompts were continued now.

    Raises:
        BatchFileError: a line of the source is not as described, or does not fit the model's context; the target
            cannot be written, or holds results of other jobs. All of this before anything is generated.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise BatchFileError(f"batch_size: expected a whole number from 1 up, got {batch_size!r}")
    jobs = read_jobs(model, source, settings)
    hashes = [job.hash(model.name) for job in jobs]
    there = 0 if overwrite or not target.exists() else _lines_kept(target, hashes)
    done = there
    progress(done, len(jobs))
    try:
        with target.open("ab" if there else "wb") as file:
            for batch in _batches(jobs, batch_size):
                if batch[-1].line <= there:
                    continue
                lines = _results(model, batch, hashes)
                file.write(b"".join(line for job, line in zip(batch, lines, strict=True) if job.line > there))
                file.flush()
                os.fsync(file.fileno())
                done = batch[-1].line
                progress(done, len(jobs))
    except OSError as error:
        raise BatchFileError(f"{target}: expected a file that can be written ({error.strerror})") from None
    return done - there


def read_jobs(model: Model, source: Path, settings: dict[str, Any]) -> list[Job]:
    """The jobs of a file, checked. A line's number is its place among the lines that are not blank."""
    try:
        texts = source.read_text(encoding="utf-8").split("\n")  # not splitlines, which knows more ends
    except (OSError, UnicodeDecodeError) as error:
        raise BatchFileError(f"{source}: expected a readable file in UTF-8 ({error})") from None
    jobs: list[Job] = []
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                jobs.append(_job(model, len(jobs) + 1, text, settings))
            except (LlorchError, TypeError) as error:
                raise BatchFileError(f"{source}: line {number}: {error}") from None
    return jobs


def _job(model: Model, line: int, text: str, settings: dict[str, Any]) -> Job:
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise BatchFileError(f"expected a JSON object ({error})") from None
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise BatchFileError('expected a JSON object with a text as "prompt"')
    own = {name: value for name, value in given.items() if name not in _OWN}
    job = Job(line, given.get("id"), given["prompt"], {**settings, **own})
    make_sampler(**{name: value for name, value in job.settings.items() if name not in _HOW})
    for name in (_LENGTH, "seed"):
        if type(job.settings.get(name, 1)) is not int:
            raise BatchFileError(f"{name}: expected a whole number, got {job.settings[name]!r}")
    count, new = len(tokenizer_of(model).encode(job.prompt)), job.settings.get(_LENGTH, 64)
    if count == 0 or new < 1:
        raise BatchFileError(f"expected a prompt and {_LENGTH} of at least one token, got {count} and {new}")
    if job.settings.get("overflow", "error") == "error" and count + new - 1 > model.config.n_positions:
        raise BatchFileError(
            f"expected a prompt and new tokens within the context of {model.config.n_positions}, got {count} and {new}"
        )
    return job


def _batches(jobs: list[Job], size: int) -> list[list[Job]]:
    """Neighbours with the same settings but for the seed, in groups of at most `size`."""

    def settings(job: Job) -> dict[str, Any]:
        return {name: value for name, value in job.settings.items() if name != "seed"}

    runs = [list(group) for _, group in groupby(jobs, settings)]
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]


def _results(model: Model, batch: list[Job], hashes: list[str]) -> list[bytes]:
    """The lines of a batch."""
    settings = {**batch[0].settings, "seed": [job.settings.get("seed", 0) for job in batch]}
    outputs = generate(model, [job.prompt for job in batch], **settings)
    return [_line(job, out, hashes[job.line - 1]) for job, out in zip(batch, outputs, strict=True)]


def _line(job: Job, out: Generation, job_hash: str) -> bytes:
    fields = {"line": job.line, "id": job.id, "prompt": job.prompt, "text": out.text}
    fields |= {"finish_reason": out.finish_reason, "stop_reason": out.stop_reason}
    fields |= {"prompt_tokens": len(out.prompt_ids), "token_ids": out.token_ids, "job": job_hash}
    if out.top_logprobs is not None:
        fields |= {"logprobs": out.logprobs, "top_logprobs": out.top_logprobs}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def _lines_kept(target: Path, hashes: list[str]) -> int:
    """How many results a file holds; cuts off a half-written one."""
    try:
        content = target.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            _check_line(target, number, line, hashes)
        if len(whole) < len(content):
            os.truncate(target, len(whole))
    except OSError as error:
        raise BatchFileError(f"{target}: expected a file to go on with ({error.strerror})") from None
    return whole.count(b"\n")


def _check_line(target: Path, number: int, line: bytes, hashes: list[str]) -> None:
    try:
        found = json.loads(line)["job"]
    except (ValueError, KeyError, TypeError):
        found = None
    if number > len(hashes) or found != hashes[number - 1]:
        raise BatchFileError(
            f"{target}: line {number}: expected the result of prompt {number} with these settings, got another; name a "
            "new file, or start this one anew with overwrite"
        )
