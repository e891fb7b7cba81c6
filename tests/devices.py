"""Scripts that run on several host devices, whose number JAX takes from the environment when it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def environment(devices: int | None = None) -> dict[str, str]:
    """That of this process, with a number of host devices and the modules of the tests."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "error"}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    if devices is not None:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        env["XLA_FLAGS"] = flags.strip()
    return env


def answer(script: str, devices: int = 8, *arguments: str) -> Any:
    """What a script prints as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment(devices), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
