"""Continues the prompts in a file of JSON lines, in batches; an interrupted run resumes where it stopped.

A line of the input is an object with "prompt" and, optionally, "id" and options of `generate` that differ from the
run's. Neighbours with equal options share a batch. Each prompt has a seed of its own, so it gets what it would get
alone. A batch's results are on the disk before the next one begins; a line of the output begins with a hash of its
job, by which a later run recognises it.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import jax

from llorch_jax.cache.files import fingerprint
from llorch_jax.errors import BatchFileError
from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.generation import continue_texts
from llorch_jax.text.jobs import Job, JobReader
from llorch_jax.text.results import Generation
from llorch_jax.tracing import from_first_process, whole


def generate_file(
    model: Model,
    source: Path,
    target: Path,
    *,
    batch_size: int = 8,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> int:
    """Continues all prompts of a file.

    Args:
        model: from `load`.
        source: a JSON Lines file.
        target: JSON lines, one per prompt, in their order: job, line, id, prompt, text, finish_reason, stop_reason,
            prompt_tokens, token_ids. Results of this job that it holds already are kept; an incomplete last one is
            cut off. Any other content is refused and left as it is.
        batch_size: maximum number of prompts that run at once. A resumed run makes the same batches.
        overwrite: whether to replace the target, whatever it holds.
        progress: called with the number of prompts done and in total.
        options: options of `generate`, which lines may override.

    Of several processes that compute together, the first reads and writes the target.

    Returns:
        The number of prompts continued by this call.

    Raises:
        LlorchError: an option is unknown or invalid.
        BatchFileError: a line of the source is not as described, or does not fit the model's context; the target is
            the source, cannot be written, or holds anything but results of this job. All of this is found before
            anything is generated or written.
    """
    whole("batch_size", batch_size, BatchFileError)
    jobs = JobReader(model, options).read(source)
    first = jax.process_index() == 0
    if first:
        _check_target(source, target)
    weights = fingerprint(model.params, model.config)
    heads = [head_of(job, weights) for job in jobs]
    kept = first and not overwrite and target.exists()
    there = from_first_process(_results_kept(target, heads) if kept else 0)
    written = target if first else Path(os.devnull)
    done = there
    progress(done, len(jobs))
    try:
        with written.open("ab" if there else "wb") as file:
            for batch in batches_of(jobs, batch_size):
                if batch[-1].line <= there:
                    continue
                outputs = continue_jobs(model, batch)
                for job, out in zip(batch, outputs, strict=True):
                    if job.line > there:
                        file.write(result_line(heads[job.line - 1], out))
                file.flush()
                if first:
                    os.fsync(file.fileno())
                done = batch[-1].line
                progress(done, len(jobs))
    except OSError as error:
        raise BatchFileError(f"{target}: expected a file that can be written ({error.strerror})") from None
    return done - there


def batches_of(jobs: list[Job], size: int) -> list[list[Job]]:
    """Consecutive jobs whose settings differ only in the seed, in groups of at most `size`."""

    def settings(job: Job) -> dict[str, Any]:
        return {name: value for name, value in job.settings.items() if name != "seed"}

    runs = [list(group) for _, group in groupby(jobs, settings)]
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]


def continue_jobs(model: Model, batch: list[Job]) -> list[Generation]:
    """The results of jobs whose settings differ only in the seed, as one batch; each gets what it would get alone."""
    seeds: Any = tuple(job.options.seed for job in batch)
    options = dataclasses.replace(batch[0].options, seed=seeds)
    return continue_texts(model, [job.prompt for job in batch], options)


def head_of(job: Job, weights: str) -> bytes:
    """The beginning of a job's result line: everything that is known before it runs."""
    fields = {"job": job.hash(weights), "line": job.line, "id": job.id, "prompt": job.prompt}
    return json.dumps(fields, ensure_ascii=False).encode()[:-1]


def result_line(head: bytes, out: Generation) -> bytes:
    """The line of a result; `head` is from `head_of`."""
    fields: dict[str, Any] = {"text": out.text, "finish_reason": out.finish_reason, "stop_reason": out.stop_reason}
    fields |= {"prompt_tokens": len(out.prompt_ids), "token_ids": out.token_ids}
    if out.top_logprobs is not None:
        fields |= {"logprobs": out.logprobs, "top_logprobs": out.top_logprobs}
    return head + b", " + json.dumps(fields, ensure_ascii=False).encode()[1:] + b"\n"


def _check_target(source: Path, target: Path) -> None:
    """Raises BatchFileError for a target that must not be written, whatever it holds."""
    try:
        if target.exists() and not target.is_file():
            raise BatchFileError(f"{target}: expected a regular file or none, got another kind")
        same = target.exists() and target.samefile(source)
    except (OSError, ValueError) as error:
        raise BatchFileError(f"{target}: expected a file that can be written ({error})") from None
    if same:
        raise BatchFileError(f"{target}: expected another file than that of the prompts, got the same")


def _results_kept(target: Path, heads: list[bytes]) -> int:
    """The number of results of this job in a file; an incomplete last one is cut off.

    Raises:
        BatchFileError: the file holds anything else; it is left unchanged.
    """
    try:
        content = target.read_bytes()
        lines = content.split(b"\n")
        last = lines.pop()
        for number, line in enumerate(lines, 1):
            if number > len(heads) or not line.startswith(heads[number - 1] + b", "):
                raise _other_content(target, number)
        if last:
            head = heads[len(lines)] + b", " if len(lines) < len(heads) else b""
            if not (head.startswith(last) or (head and last.startswith(head))):
                raise _other_content(target, len(lines) + 1)
            os.truncate(target, len(content) - len(last))
    except OSError as error:
        raise BatchFileError(f"{target}: expected a file to resume ({error.strerror})") from None
    return len(lines)


def _other_content(target: Path, number: int) -> BatchFileError:
    return BatchFileError(
        f"{target}: line {number}: expected the result of prompt {number} with these settings, got something else; "
        "name a new file, or replace this one with overwrite"
    )
