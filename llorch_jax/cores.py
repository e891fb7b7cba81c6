"""The cores of this machine that the process may use."""

import os
import re


def usable_cores() -> int:
    """Number of cores in the process's CPU affinity, or of all cores where the system has no affinities."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices_asked_for() -> int:
    """Number of host devices that XLA_FLAGS asks for; 1 if it says nothing about them."""
    numbers = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(numbers[-1]) if numbers else 1


def allow_threads(devices: int) -> None:
    """Makes XLA's pool of threads large enough for several devices of one CPU, unless JAX has started already.

    Devices of one process wait for each other inside this pool. With a thread per core, which is XLA's default, all
    threads may be waiting while the device that they wait for has none left to compute its next operation on.
    """
    if devices > 1:
        os.environ.setdefault("NPROC", str(usable_cores() + 2 * devices))
