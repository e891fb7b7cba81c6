"""The library in processes of their own: other instruction sets, one core, no kernels, sanitizers."""

import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from profiles import THOROUGH

from llorch_jax.kernels import describe
from llorch_jax.linear import matmul

ROOT = Path(__file__).parents[2]
NATIVE = describe().isa
needs_kernels = pytest.mark.skipif(NATIVE is None, reason=f"no native kernels: {describe().reason}")

PROBE = """
import jax, numpy as np
from llorch_jax.kernels import describe
from llorch_jax.linear import matmul, plain_matmul
from llorch_jax.quantization import Codes, quantize_matrix
weight = np.random.default_rng(0).standard_normal((300, 200), dtype=np.float32)
x = np.random.default_rng(1).standard_normal((200, 3), dtype=np.float32)
for matrix in (weight, quantize_matrix(weight, Codes(8, None)), quantize_matrix(weight, Codes(4, 32))):
    np.testing.assert_allclose(jax.jit(matmul)(matrix, x), jax.jit(plain_matmul)(matrix, x), atol=5e-3)
print(describe().isa, "|", describe().reason)
"""


def probe(*prefix, **environment):
    """What a process of its own says about its kernels, after comparing them with the twins."""
    command = [*prefix, sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@needs_kernels
@pytest.mark.parametrize("isa", ["portable", *(["avx2"] if NATIVE in ("avx2", "avx512") else [])])
def test_other_instruction_sets_agree_with_the_twins(isa):
    assert probe(LLORCH_JAX_ISA=isa) == f"{isa} |"


@needs_kernels
@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset")
def test_one_core_is_enough():
    assert probe("taskset", "-c", str(min(os.sched_getaffinity(0)))) == f"{NATIVE} |"


@needs_kernels
def test_two_spawned_processes_work_at_once():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(norm_of_product, [0, 0], chunksize=1)
    assert first == second == norm_of_product(0)


def norm_of_product(seed):
    rng = np.random.default_rng(seed)
    weight, x = rng.standard_normal((900, 128), np.float32), rng.standard_normal((128, 4), np.float32)
    return float(jnp.linalg.norm(jax.jit(matmul)(jnp.asarray(weight), jnp.asarray(x))))


def test_without_kernels_the_twins_serve_and_the_reason_is_told():
    assert probe(LLORCH_JAX_KERNELS="off") == "None | LLORCH_JAX_KERNELS=off"


@needs_kernels
def test_an_unknown_instruction_set_is_named():
    assert probe(LLORCH_JAX_ISA="mmx") == "None | LLORCH_JAX_ISA=mmx is not an instruction set of this machine"


@needs_kernels
def test_a_library_built_from_other_sources_is_left_alone(monkeypatch):
    library = importlib.import_module("llorch_jax.kernels.library")  # a function has the same name
    monkeypatch.setattr(library, "_INTERFACE", 10_000)
    isa, reason = library._load(library._path())
    assert isa is None
    assert reason.endswith("was built from other sources: install the package again")


@needs_kernels
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no compiler")
def test_sanitizers_find_nothing(tmp_path):
    def run(*command, **environment):
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    # Compiling is what takes long. What AVX2 has to itself, next to AVX-512 and the portable code, works in registers.
    vectors = [] if NATIVE == "portable" else ["avx2", NATIVE] if THOROUGH and NATIVE == "avx512" else [NATIVE]
    isas = f"-DLLORCH_X86_ISAS={';'.join(vectors)}"
    run("cmake", "-S", str(ROOT / "native"), "-B", str(tmp_path), "-DLLORCH_SANITIZE=ON", isas)
    run("cmake", "--build", str(tmp_path), "--parallel", "2")
    for isa in ("portable", *vectors):
        assert run(str(tmp_path / "driver"), "150", LLORCH_JAX_ISA=isa) == f"{isa}: 150 cases\n"
