"""The cores of this machine that the process may use."""

import os


def usable_cores() -> int:
    """Number of cores in the process's CPU affinity, or of all cores where the system has no affinities."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
