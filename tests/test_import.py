"""What importing the package costs: nothing until a name is used, then little more than JAX itself."""

import os
import subprocess
import sys

import pytest

import llorch_jax as lj

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}
USE = "import llorch_jax; llorch_jax.load, llorch_jax.generate, llorch_jax.stream, llorch_jax.generate_tokens"


def processor_seconds(imports: str) -> float:
    """Time on the processor, which other processes on the machine hardly change, of fresh imports."""
    code = f"import time; {imports}; print(time.process_time())"
    return float(subprocess.check_output([sys.executable, "-c", code], env=ENVIRONMENT))


def test_importing_takes_less_than_1_5_times_as_long_as_jax_and_using_little_longer_than_jax_and_flax():
    ours = "import llorch_jax"
    times: dict[str, list[float]] = {"import jax": [], "import jax, flax.struct": [], ours: [], USE: []}
    for _ in range(8):  # the least of several, taken in turns; more of them where the machine is busy
        for imports, found in times.items():
            found.append(processor_seconds(imports))
        jax, with_flax, imported, used = map(min, times.values())
        if len(times[USE]) >= 2 and imported < 1.5 * jax and used < 1.4 * with_flax:
            return
    raise AssertionError(
        f"seconds: jax {jax:.2f}, with flax {with_flax:.2f}, llorch_jax {imported:.2f}, used {used:.2f}"
    )


def test_leaves_out_what_only_the_command_line_and_tools_need():
    code = (
        f"import sys, jax, flax.struct; before = set(sys.modules); {USE};"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before}); print(*sys.modules)"
    )
    new, everything = subprocess.check_output([sys.executable, "-c", code], env=ENVIRONMENT, text=True).splitlines()
    assert "rich" not in new.split()  # flax brings its own part of it
    unwanted = {"typer", "huggingface_hub", "matplotlib", "optax", "llorch_jax.cli.app", "llorch_jax.cli.terminal"}
    unwanted |= {"llguidance", "llorch_jax.text.constrained.decoding"}
    assert not unwanted & set(everything.split())
    assert {"llorch_jax", "jax", "llorch_jax.text.generation"} <= set(everything.split())


def test_imports_jax_when_a_name_is_first_used():
    code = "import sys, llorch_jax; assert 'jax' not in sys.modules; llorch_jax.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        lj.no_such_name  # noqa: B018


def test_all_names_are_there_and_in_order():
    assert list(lj.__all__) == sorted(lj.__all__)
    assert all(hasattr(lj, name) for name in lj.__all__)
    assert set(lj.__all__) <= set(dir(lj))
