"""Many prompts on many machines: Ray Data maps a dataset over a pool of actors, each of which has loaded the model.

Ray starts the actors, hands out batches as fast as they are taken, replaces actors that die and repeats what they were
doing, and remembers which batches of a file are written. Here is only what an actor does with a batch. Ray is imported
when it is used.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llorch_jax.cache.files import fingerprint
from llorch_jax.errors import BatchFileError, ClusterError, LlorchError, OptionError
from llorch_jax.loading.checkpoint import Model, PathLike, load, locate
from llorch_jax.text.batch_file import batches_of, head_of
from llorch_jax.text.jobs import JobReader, check_settings
from llorch_jax.tracing import is_whole, whole

if TYPE_CHECKING:
    from ray.data import Dataset

LOCAL = "local"  # the address that stands for a new cluster on this machine
_OWN_ERROR = "llorch_jax.errors."
_PATIENCE = 5.0  # seconds for which an address may take to answer


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that every actor loads for itself.

    Attributes:
        name: as for `load`; a directory or file must have the same absolute path on all machines.
        weights: as for `load`.
        group_size: as for `load`.
    """

    name: str
    weights: Any = None
    group_size: int | None = None

    @classmethod
    def of(cls, model: PathLike, weights: Any = None, group_size: int | None = None) -> "Source":
        """A model that exists, by a name that does not depend on the working directory.

        Raises:
            CheckpointError: there is no such model.
        """
        locate(model)
        path = Path(model)
        own = model != "demo" and path.exists()
        return cls(str(path.resolve()) if own else str(model), weights, group_size)

    def load(self) -> Model:
        """The model."""
        return load(self.name, weights=self.weights, group_size=self.group_size)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The actors of a run.

    Attributes:
        actors: how many; a number, or the least and the most, between which Ray chooses; None for 1 to as many as the
            cluster has room for.
        cpus: of each actor: Ray reserves them, and XLA starts as many threads.
    """

    actors: int | tuple[int, int] | None = None
    cpus: float = 1

    def __post_init__(self) -> None:
        both = self.actors if isinstance(self.actors, tuple) else (self.actors or 1, self.actors or 1)
        if len(both) != 2 or not all(is_whole(each) for each in both) or not 1 <= both[0] <= both[1]:
            raise OptionError(f"actors: expected 1 or more, or the least and the most, got {self.actors!r:.60}")
        if self.actors == 0:
            raise OptionError("actors: expected 1 or more, got 0")
        if not isinstance(self.cpus, int | float) or not 0 < self.cpus < math.inf:
            raise OptionError(f"cpus: expected a number above 0, got {self.cpus!r:.60}")

    def map(self, dataset: "Dataset", actor: type, batch_size: int, **settings: Any) -> "Dataset":
        """The dataset, mapped by actors that are made with the settings."""
        from ray.data import ActorPoolStrategy

        least, most = self.actors if isinstance(self.actors, tuple) else (self.actors or 1, self.actors)
        return dataset.map_batches(
            actor,
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=least, max_size=most),
            num_cpus=self.cpus,
            fn_constructor_kwargs={"threads": math.ceil(self.cpus), **settings},
        )


_ANY = Pool()


def generate(
    dataset: "Dataset",
    model: PathLike = "demo",
    *,
    weights: Any = None,
    group_size: int | None = None,
    prompt_column: str = "prompt",
    option_columns: Sequence[str] = (),
    batch_size: int = 8,
    actors: int | tuple[int, int] | None = None,
    cpus: float = 1,
    **options: Any,
) -> "Dataset":
    """Continues the prompts of a Ray dataset, lazily: nothing runs until the result is used.

    Args:
        dataset: any dataset of Ray Data with a column of prompts.
        model: as for `load`; every actor loads it. A directory must be there on every machine.
        weights: how the weights are kept, as for `load`.
        group_size: as for `load`.
        prompt_column: the column with the prompts.
        option_columns: columns whose values are options of their rows, such as seed; a null leaves the option out.
        batch_size: maximum number of prompts that an actor runs at once.
        actors: number of actors, or the least and the most; None for 1 to as many as the cluster has room for.
        cpus: processors of each actor.
        options: options of `generate`, for all rows. Each row gets the text that `generate` gives its prompt alone.

    Returns:
        The same rows with the columns text, tokens (ids of the new tokens), logprobs (of each), finish_reason and, if
        the option top_logprobs is given, top_logprobs. Rows may change their order; for the same order, set
        `ray.data.DataContext.get_current().execution_options.preserve_order`.

    Raises:
        ClusterError: the extra `ray` is missing, or the dataset has no such column, or has one of the result's.
        CheckpointError: there is no such model.
        LlorchError: an option is unknown or invalid. An invalid prompt is found by an actor, and then ends the run
            with an error that names it, unless `DataContext.max_errored_blocks` allows for some.
    """
    _require_ray()
    from llorch_jax.ray_actors import RowActor, check_columns

    if not hasattr(dataset, "map_batches"):
        raise ClusterError(f"dataset: expected a ray.data.Dataset, got a {type(dataset).__name__}")
    whole("batch_size", batch_size, OptionError)
    pool = Pool(actors, cpus)
    check_settings(options)
    schema = dataset.schema(fetch_if_missing=False)
    if schema is not None:
        check_columns(schema.names, prompt_column, option_columns, options)
    source = Source.of(model, weights, group_size)
    columns = {"prompt_column": prompt_column, "option_columns": tuple(option_columns)}
    return pool.map(dataset, RowActor, batch_size, source=source, options=options, **columns)


@contextlib.contextmanager
def cluster(address: str, pool: Pool = _ANY) -> Iterator[None]:
    """Connects this process to a cluster for the body. Do so before JAX runs: Ray forks to start a new one.

    Args:
        address: of a cluster of which this machine is a node: HOST:PORT, or auto for the one that runs here; or local
            for a new one on this machine, which ends with the body.
        pool: the actors that are to run there.

    Raises:
        ClusterError: the extra `ray` is missing, there is no cluster at the address, or a new one has no room for an
            actor.
    """
    _require_ray()
    import ray

    # No reports to Ray's makers, and no messages of processes on the terminal; Ray's log files have them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.addFilter(lambda record: record.levelno == logging.WARNING)
    try:
        host, separator, port = address.rpartition(":")
        if separator and port.isdigit() and "/" not in host:  # Ray would wait for more than a minute
            socket.create_connection((host, int(port)), _PATIENCE).close()
        new = {"include_dashboard": False} if address == LOCAL else {}
        with _silent_stderr():  # Ray's C++ part announces the level of its log
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **new)
    except (OSError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        raise ClusterError(
            f"ray: expected {LOCAL}, auto, or the address HOST:PORT of a cluster of which this machine is a node, "
            f"got {address:.80} ({_reason(error)})"
        ) from None
    try:
        there = ray.cluster_resources().get("CPU", 0)
        if address == LOCAL and pool.cpus > there:
            raise ClusterError(f"cpus: expected at most {there:g}, as this machine has, got {pool.cpus:g}")
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what is written on descriptor 2, from C++ too."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def generate_file(
    model: Model,
    loaded_from: Source,
    source: Path,
    target: Path,
    *,
    batch_size: int = 8,
    overwrite: bool = False,
    pool: Pool = _ANY,
    **options: Any,
) -> int:
    """Continues all prompts of a file on the cluster to which this process is connected.

    The lines are those of `llorch_jax.text.batch_file.generate_file`. They are written as files named by the numbers
    of their first lines: one after the other, they are the file that a local run writes. Beside them, Ray's checkpoint
    says which are complete; a later run with the same arguments continues there.

    Args:
        model: the model, for checking the lines.
        loaded_from: where the actors find it.
        source: a JSON Lines file, read by this process.
        target: a directory that all machines share; created if necessary.
        batch_size: maximum number of prompts that an actor runs at once.
        overwrite: whether to remove results of other jobs.
        pool: the actors.
        options: options of `generate`, which lines may override.

    Returns:
        The number of prompts continued by this call.

    Raises:
        LlorchError: an option is unknown or invalid.
        BatchFileError: a line does not fit, or the target holds anything but results of this job; nothing has run.
        ClusterError: the extra `ray` is missing, or the run failed.
    """
    _require_ray()
    from llorch_jax import ray_files
    from llorch_jax.ray_actors import LineActor

    whole("batch_size", batch_size, BatchFileError)
    jobs = JobReader(model, options).read(source)
    weights = fingerprint(model.params, model.config)
    batches = batches_of(jobs, batch_size)
    # The numbers of the batches' first lines are what the checkpoint remembers: they are a part of the job.
    parts = [f"{batch[0].line}".encode() for batch in batches] + [head_of(job, weights) for job in jobs]
    checkpoint = ray_files.prepare(target, hashlib.sha256(b"\n".join(parts)).hexdigest()[:16], overwrite)
    if not batches:
        return 0
    settings = {"source": loaded_from, "weights": weights}
    with _one_line():
        return ray_files.run(batches, target, checkpoint, lambda data: pool.map(data, LineActor, 1, **settings))


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turns what ends a run into an error with one line."""
    import ray

    try:
        yield
    except LlorchError:
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(f"ray: the run failed: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """One line of an error of Ray, which shows a whole traceback: this package's own error in it, or the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(_OWN_ERROR)]
    named = [line for line in lines if re.match(r"[\w.]+: ", line)]
    text: str = (own or named or lines or [type(error).__name__])[-1]
    return text.partition(": ")[2] if own else text[:300]


def _require_ray() -> None:
    """Raises ClusterError unless Ray Data can be imported."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ClusterError(
            f"ray: expected the extra `ray`, got no {error.name}; install it with pip install 'llorch-jax[ray]'"
        ) from None
