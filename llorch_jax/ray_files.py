"""Batches of a file's jobs as a source of Ray Data, and files of lines as its sink."""

import pickle
import posixpath
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ray.data import DataContext, Dataset, Datasource, read_datasource
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink, ReadTask, WriteResult

from llorch_jax import files
from llorch_jax.errors import BatchFileError

if TYPE_CHECKING:  # the processes that read and write need no JAX
    from llorch_jax.text.jobs import Job

BATCH = pa.schema([("first", pa.int64()), ("jobs", pa.binary())])  # the number of the first line, and pickled jobs
LINES = pa.schema([("first", pa.int64()), ("count", pa.int64()), ("lines", pa.binary())])

_MOST_PARTS = 1000  # number of files, each of which is written as a whole
_WRITERS = 2
_PART = re.compile(r"\d{12}\.jsonl")
_CHECKPOINT = "checkpoint-"


class Batches(Datasource):
    """Batches of jobs, as rows of `BATCH`."""

    def __init__(self, batches: list[list["Job"]]) -> None:
        super().__init__()
        self._rows = [(batch[0].line, pickle.dumps(batch)) for batch in batches]

    def estimate_inmemory_data_size(self) -> int:
        """The bytes of all rows."""
        return sum(len(jobs) for _, jobs in self._rows)

    def get_read_tasks(self, parallelism: int, *limits: Any, **more: Any) -> list[ReadTask]:
        """One task for each of `parallelism` parts of about equal numbers of rows, in order."""
        count = len(self._rows)
        parts = min(parallelism, count)
        cuts = [count * part // parts for part in range(parts + 1)]
        return [self._task(self._rows[start:end]) for start, end in pairwise(cuts)]

    def _task(self, rows: list[tuple[int, bytes]]) -> ReadTask:
        table = pa.table([list(column) for column in zip(*rows, strict=True)], BATCH)
        about = BlockMetadata(num_rows=len(rows), size_bytes=table.nbytes, input_files=None, exec_stats=None)
        return ReadTask(partial(_once, table), about, schema=BATCH)


def _once(table: pa.Table) -> list[pa.Table]:
    return [table]


class Lines(BlockBasedFileDatasink):
    """Writes rows of `LINES` to files named by the number of their first line: a repeated write replaces the file."""

    continued = 0  # number of lines, once all are written

    def write(self, blocks: Iterable[Any], ctx: Any) -> int:
        """Writes one file, and returns its number of lines."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return 0
        rows = pa.concat_tables(tables).sort_by("first").to_pydict()
        with self.open_output_stream(posixpath.join(self.path, f"{rows['first'][0]:012}.jsonl")) as file:
            for lines in rows["lines"]:
                file.write(lines)
        return sum(rows["count"])

    def on_write_complete(self, write_result: WriteResult[int]) -> None:
        """Counts the lines of all files."""
        self.continued = sum(write_result.write_returns)


def prepare(target: Path, job: str, overwrite: bool) -> Path:
    """Checks the directory of the results, and returns that of the job's checkpoint in it.

    Args:
        target: the directory; created if necessary.
        job: a hash of everything on which the results depend.
        overwrite: whether to remove results of other jobs.

    Raises:
        BatchFileError: it holds anything but results of this job, or of others with `overwrite`; or is no directory.
    """
    checkpoint = target / f"{_CHECKPOINT}{job}"
    with files.explaining(target, BatchFileError, "written"):
        if target.exists() and not target.is_dir():
            raise BatchFileError(f"{files.shown(target)}: expected a directory or none, got another kind")
        target.mkdir(parents=True, exist_ok=True)
        found = sorted(target.iterdir())
        rest = [path for path in found if not _PART.fullmatch(path.name) and path != checkpoint]
        if overwrite and all(path.name.startswith(_CHECKPOINT) for path in rest):
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif rest or (found and checkpoint not in found):
            raise BatchFileError(
                f"{files.shown(target)}: expected results of this job with these settings, or none, got "
                f"{files.shown((rest or found)[0].name)}; name a new directory, or replace results of other jobs with "
                "overwrite"
            )
    return checkpoint


def run(batches: list[list["Job"]], target: Path, checkpoint: Path, mapped: Callable[[Dataset], Dataset]) -> int:
    """Writes the lines of all batches that the checkpoint does not have, and returns their number.

    Args:
        batches: of jobs.
        target: the directory of the results.
        checkpoint: the directory of the checkpoint.
        mapped: makes rows of `LINES` of rows of `BATCH`.
    """
    context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column="first", checkpoint_path=str(checkpoint.resolve()), delete_checkpoint_on_success=False
    )
    context.print_on_execution_start = False
    sink = Lines(str(target.resolve()), file_format="jsonl")
    parts = min(len(batches), _MOST_PARTS)
    with DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")  # few batches, which is no fault
        # Reading and writing take next to no time, and must not wait for processors that the actors have reserved.
        dataset = read_datasource(Batches(batches), override_num_blocks=parts, num_cpus=0, concurrency=1)
        mapped(dataset).write_datasink(sink, ray_remote_args={"num_cpus": 0}, concurrency=_WRITERS)
    return sink.continued
