"""What importing the package costs."""

import os
import subprocess
import sys

import llorch_jax as lj

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def processor_seconds(module: str) -> float:
    """Time on the processor, which other processes on the machine hardly change, of a fresh import."""
    code = f"import time; import {module}; print(time.process_time())"
    return float(subprocess.check_output([sys.executable, "-c", code], env=ENVIRONMENT))


def test_takes_less_than_1_5_times_as_long_as_importing_jax():
    times: dict[str, list[float]] = {"jax": [], "jax, flax.struct": [], "llorch_jax": []}
    for _ in range(9):  # the least of several, taken in turns; more of them where the machine is busy
        for module, found in times.items():
            found.append(processor_seconds(module))
        jax, with_flax, ours = map(min, times.values())
        if len(times["jax"]) >= 3 and ours < 1.5 * jax and ours < 1.25 * with_flax:
            return
    raise AssertionError(f"importing llorch_jax took {ours:.2f} s, jax {jax:.2f} s, jax with flax {with_flax:.2f} s")


def test_leaves_out_what_only_the_command_line_and_tools_need():
    code = (
        "import sys, jax, flax.struct; before = set(sys.modules); import llorch_jax;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before}); print(*sys.modules)"
    )
    new, everything = subprocess.check_output([sys.executable, "-c", code], env=ENVIRONMENT, text=True).splitlines()
    assert "rich" not in new.split()  # flax brings its own part of it
    unwanted = {"typer", "huggingface_hub", "matplotlib", "optax", "llorch_jax.cli.app", "llorch_jax.cli.terminal"}
    unwanted |= {"llguidance", "llorch_jax.text.constrained.decoding"}
    assert not unwanted & set(everything.split())
    assert {"llorch_jax", "jax", "llorch_jax.text.generation"} <= set(everything.split())


def test_all_names_are_there_and_in_order():
    assert list(lj.__all__) == sorted(lj.__all__)
    assert all(hasattr(lj, name) for name in lj.__all__)
