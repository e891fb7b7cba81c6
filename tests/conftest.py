"""Strict JAX settings for every test, and what keeps the suite's time and memory within bounds."""

import ctypes
import dataclasses
import gc
import os
import sys
from pathlib import Path

import profiles

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
if not profiles.THOROUGH:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {profiles.QUICK_XLA_FLAGS}".strip()

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
settings.load_profile("thorough" if profiles.THOROUGH else "quick")


# The files that take longest: a worker that began with one of them at the end would leave the other without work.
LONG = [
    "test_sharding.py",
    "test_ray.py",
    "test_docs.py",
    "kernels/test_library.py",
    "evaluation/test_reference.py",
    "engine/test_core.py",
    "cache/paged/test_cache.py",
    "cache/test_soak.py",
    "cli/test_devices.py",
    "decoding/speculative/test_loop.py",
    "cache/test_pairs.py",
    "text/test_generation.py",
    "cache/test_quantized.py",
    "cache/test_properties.py",
    "engine/test_offload.py",
    "engine/test_guides.py",
    "cache/test_rotating.py",
    "cache/evicting/test_cache.py",
    "cli/test_chat.py",
    "serve/test_soak.py",
    "decoding/test_loop.py",
    "engine/test_prefix_files.py",
    "kernels/test_attention.py",
]


def pytest_collection_modifyitems(items):
    """Files in the order in which workers are to take them."""
    rank = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))


def pytest_collection_finish(session):
    """What importing has made stays: from now on the garbage collector leaves it alone, which saves a twentieth."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    """Compiled programs are kept in pytest's cache, shared by workers, their children and runs.

    `--cache-clear` empties it.
    """
    if jax.config.jax_compilation_cache_dir is None:
        directory = str(config.cache.mkdir("programs"))
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": directory, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def drop_programs():
    """Drops compiled programs: those of all tests would take gigabytes and too many memory maps."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # glibc keeps freed memory to itself otherwise


@pytest.fixture(autouse=True)
def bounded_memory():
    yield
    if resident_bytes() > 1.1e9:
        drop_programs()


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    yield
    drop_programs()


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory):
    """What to load where it is the same what the demo model says: a directory, `demo`, with its first two layers.

    They compile in a third of the time that eight take. In `make thorough` all of it.
    """
    import llorch_jax as lj

    if profiles.THOROUGH:
        return "demo"
    folder, model = tmp_path_factory.mktemp("package") / "assets" / "demo", lj.load("demo")
    config, params = dataclasses.replace(model.config, n_layer=2), model.params.replace(blocks=model.params.blocks[:2])
    lj.save_model(folder, config, params, model.tokenizer, "float16")
    return folder
