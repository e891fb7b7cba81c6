"""The cores of this machine that the process may use."""

import contextlib
import os
import re
from collections.abc import Iterator


def usable_cores() -> int:
    """Number of cores in the process's CPU affinity, or of all cores where the system has no affinities."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices_asked_for() -> int:
    """Number of host devices that XLA_FLAGS asks for; 1 if it says nothing about them."""
    numbers = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(numbers[-1]) if numbers else 1


def take_enough_threads() -> None:
    """`enough_threads` for the rest of the process, if XLA_FLAGS asks for several devices."""
    devices = devices_asked_for()
    if devices > 1:
        os.environ.setdefault("NPROC", _threads(devices))


def limit_threads(count: int) -> None:
    """Tells XLA, before it starts, the number of threads: actors on one machine share its processors."""
    os.environ["NPROC"] = str(count)


@contextlib.contextmanager
def enough_threads(devices: int) -> Iterator[None]:
    """Makes XLA's pool of threads large enough for several devices of one CPU, if JAX starts meanwhile.

    Devices of one process wait for each other inside this pool. With a thread per core, which is XLA's default, all
    threads may be waiting while the device that they wait for has none left to compute its next operation on.
    """
    if devices < 2 or "NPROC" in os.environ:
        yield
        return
    os.environ["NPROC"] = _threads(devices)
    try:
        yield
    finally:
        del os.environ["NPROC"]


def _threads(devices: int) -> str:
    return str(usable_cores() + 2 * min(devices, 64))
