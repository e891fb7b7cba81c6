"""Devices and processes of a command: its mesh, and meeting the other processes of the run.

Both have to be settled before JAX looks for devices, which is when a model is loaded.
"""

import contextlib
import ctypes
import os
import re
import signal
from typing import Any

import jax
from jax.sharding import Mesh

from llorch_jax.cli import streams
from llorch_jax.errors import MeshError
from llorch_jax.meshes import ROWS, make_mesh
from llorch_jax.tracing import whole

MEETING = 60  # seconds in which all processes must have come
SILENCE = 20  # seconds after which a process that does not answer is given up
LOST = "another process of this run has ended, or does not answer"
_FLAG = "xla_force_host_platform_device_count"
_HANDLERS: list[Any] = []  # which must outlive their registration


def take_mesh(settings: dict[str, Any]) -> Mesh | None:
    """The mesh that a command asks for, after the other processes have come; removes what it takes from the settings.

    Raises:
        MeshError: the description of the mesh or of the processes is invalid, there are too few devices, or the
            processes did not meet.
    """
    given = {name: settings.pop(name, None) for name in ("mesh", "coordinator", "processes", "process")}
    processes = _processes(given)
    if given["mesh"] is None and processes == 1:
        return None
    sizes = {ROWS: processes} if given["mesh"] is None else parse_mesh(given["mesh"])
    wanted = sizes.get("data", 1) * sizes.get("model", 1)
    if wanted % processes:
        raise MeshError(f"mesh: expected as many devices for each of {processes} processes, got {wanted} devices")
    if _FLAG not in os.environ.get("XLA_FLAGS", ""):
        # Refused if there are devices already, whose number `make_mesh` then checks.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted // processes)
    if processes > 1:
        _meet(given["coordinator"], processes, given["process"])
    return make_mesh(**sizes)


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in a description such as data=2,model=2.

    Raises:
        MeshError: it has another form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(data|model)\s*=\s*([0-9]{1,6})\s*", part, re.ASCII)
        if found is None or found[1] in sizes or int(found[2]) < 1:
            raise MeshError(f"mesh: expected data=N,model=N with numbers from 1 up, got {text!r:.80}")
        sizes[found[1]] = int(found[2])
    return sizes


def together() -> bool:
    """Whether this process is one of several that compute together; asks nothing of devices."""
    return jax.distributed.is_initialized()


def leave() -> None:
    """Waits, for a bounded time, until all processes are done: the first must not go before the others."""
    if together():
        jax.distributed.shutdown()


def is_lost(error: Exception) -> bool:
    """Whether an error means that another process has gone."""
    signs = ("gloo", "coordination", "heartbeat", "connection closed", "connection reset", "unhealthy", "peer")
    return together() and any(sign in str(error).lower() for sign in signs)


def _say_when_aborted(descriptor: int) -> None:
    """One line on standard error when JAX aborts this process, as it does when another one has stopped to answer.

    It does so from a thread of its own, with a page of text, while Python waits for the device.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)  # type: ignore[untyped-decorator]
    def handler(number: int) -> None:
        os.write(descriptor, f"error: {LOST} (for {SILENCE} seconds)\n".encode())
        os._exit(1)

    _HANDLERS.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def _processes(given: dict[str, Any]) -> int:
    named = [name for name in ("coordinator", "processes", "process") if given[name] is not None]
    if not named:
        return 1
    if len(named) < 3:
        raise MeshError(f"coordinator: expected it with the numbers processes and process, got only {named[0]}")
    if not re.fullmatch(r"[^\s:/]+:[0-9]{1,5}", given["coordinator"], re.ASCII):
        raise MeshError(f"coordinator: expected HOST:PORT, got {given['coordinator']!r:.80}")
    processes = whole("processes", given["processes"], MeshError, most=4096)
    whole("process", given["process"], MeshError, least=0, most=processes - 1)
    return processes


def _meet(coordinator: str, processes: int, process: int) -> None:
    """Waits for the others; only process 0 writes on standard output from now on, and XLA and gloo nowhere."""
    _say_when_aborted(streams.set_apart(process == 0))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=MEETING,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=MEETING,
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MeshError(
            f"coordinator: expected {processes} processes to meet at {coordinator} within {MEETING} seconds, got "
            f"{reason:.200}"
        ) from None
