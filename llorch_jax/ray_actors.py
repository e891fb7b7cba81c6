"""What an actor does: it loads the model once, and then continues one batch of prompts after the other."""

import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from llorch_jax.cache.files import fingerprint
from llorch_jax.cores import limit_threads
from llorch_jax.errors import CheckpointError, ClusterError
from llorch_jax.ray_files import BATCH, LINES
from llorch_jax.text.batch_file import batches_of, continue_jobs, head_of, result_line
from llorch_jax.text.jobs import INVALID, Job, JobReader
from llorch_jax.text.results import Generation

if TYPE_CHECKING:
    from llorch_jax.ray import Source

_TOP = pa.list_(pa.list_(pa.struct([("id", pa.int64()), ("logprob", pa.float64())])))
_TYPES = {"text": pa.string(), "tokens": pa.list_(pa.int64()), "logprobs": pa.list_(pa.float64())}
_TYPES |= {"finish_reason": pa.string(), "top_logprobs": _TOP}


def check_columns(
    names: Sequence[str], prompt_column: str, option_columns: Sequence[str], options: Mapping[str, Any]
) -> None:
    """Raises ClusterError for a dataset that lacks a column, or has one of the result's names."""
    for name in (prompt_column, *option_columns):
        if name not in names:
            raise ClusterError(f"dataset: expected a column {name!r}, got {', '.join(map(repr, names)) or 'none'}")
    for name in _results(options):
        if name in names:
            raise ClusterError(
                f"dataset: expected no column {name!r}, which the result has, got one; "
                f"rename it with dataset.rename_columns({{{name!r}: ...}})"
            )


class RowActor:
    """Continues the prompts in a column."""

    def __init__(
        self, threads: int, source: "Source", options: dict[str, Any], prompt_column: str, option_columns: Sequence[str]
    ) -> None:
        limit_threads(threads)
        self._model = source.load()
        self._reader = JobReader(self._model, options)
        self._options = options
        self._columns = (prompt_column, tuple(option_columns))

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with what was generated."""
        prompt_column, option_columns = self._columns
        check_columns(table.column_names, prompt_column, option_columns, self._options)
        given: dict[str, list[Any]] = {"prompt": table.column(prompt_column).to_pylist()}
        given |= {name: table.column(name).to_pylist() for name in option_columns}
        rows = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
        jobs = [self._job(number, row) for number, row in enumerate(rows, 1)]
        outputs = [out for batch in batches_of(jobs, len(jobs) or 1) for out in continue_jobs(self._model, batch)]
        for name in _results(self._options):
            table = table.append_column(name, pa.array([_value(out, name) for out in outputs], _TYPES[name]))
        return table

    def _job(self, number: int, row: dict[str, Any]) -> Job:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            raise ClusterError(f"column {self._columns[0]!r}: expected texts, got {prompt!r:.60}")
        try:
            return self._reader.job(number, {name: value for name, value in row.items() if value is not None})
        except INVALID as error:
            raise ClusterError(f"the row with the prompt {prompt!r:.60}: {error}") from None


class LineActor:
    """Continues batches of jobs, and makes the lines of a file of results."""

    def __init__(self, threads: int, source: "Source", weights: str) -> None:
        limit_threads(threads)
        self._model = source.load()
        self._weights = fingerprint(self._model.params, self._model.config)
        if self._weights != weights:
            raise CheckpointError(f"{source.name}: expected the same weights on every machine, got others on one")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows of `LINES` for rows of `BATCH`."""
        rows = []
        for first, pickled in zip(*table.select(BATCH.names).to_pydict().values(), strict=True):
            batch: list[Job] = pickle.loads(pickled)
            pairs = zip(batch, continue_jobs(self._model, batch), strict=True)
            lines = b"".join(result_line(head_of(job, self._weights), out) for job, out in pairs)
            rows.append({"first": first, "count": len(batch), "lines": lines})
        return pa.Table.from_pylist(rows, LINES)


def _results(options: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_TYPES)[: None if options.get("top_logprobs") else -1]


def _value(out: Generation, name: str) -> Any:
    if name == "tokens":
        return out.token_ids
    if name == "top_logprobs":
        steps = out.top_logprobs or []
        return [[{"id": id, "logprob": logprob} for id, logprob in step] for step in steps]
    return getattr(out, name)
