"""The shared library of native kernels: found next to this file, loaded once, and registered with XLA.

If it is missing or cannot be used, the jnp twins are used instead, and `reason` says why. Two environment variables are
meant for tests: LLORCH_JAX_KERNELS=off disables the library, and LLORCH_JAX_ISA=portable, avx2 or avx512 selects an
instruction set.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax

_NAMES = ("_native.so", "_native.dylib", "_native.dll")
_TARGETS = ("llorch_matmul", "llorch_attention", "llorch_layer_norm", "llorch_summarize", "llorch_write")
_INTERFACE = 5  # to be raised, here and in dispatch.cpp, with what the custom calls take


class Library(NamedTuple):
    """The outcome of loading the library.

    Attributes:
        isa: the instruction set in use: "portable", "avx2" or "avx512"; None if the twins are used.
        reason: why the twins are used; empty if the kernels are.
    """

    isa: str | None
    reason: str


@cache
def library() -> Library:
    """The library, which the first call in a process loads and registers."""
    if os.environ.get("LLORCH_JAX_KERNELS", "").lower() == "off":
        return Library(None, "LLORCH_JAX_KERNELS=off")
    path = _path()
    if path is None:
        return Library(None, "the kernels were not built: no C++ compiler was found when the package was installed")
    try:
        return _load(path)
    except Exception as error:  # an unreadable file, or another version of XLA's interface: the twins still work
        return Library(None, f"{path.name} cannot be loaded: {error}")


def available() -> bool:
    """Whether programs traced now may call kernels: they were built, for a single CPU device or inside `shard_map`."""
    if jax.default_backend() != "cpu" or library().isa is None:
        return False
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


def _path() -> Path | None:
    here = Path(__file__).parent
    return next((here / name for name in _NAMES if (here / name).exists()), None)


def _load(path: Path) -> Library:
    native = ctypes.CDLL(str(path))
    if not hasattr(native, "llorch_interface") or native.llorch_interface() != _INTERFACE:
        return Library(None, f"{path.name} was built from other sources: install the package again")
    native.llorch_isa.restype = ctypes.c_char_p
    isa = native.llorch_isa()
    if isa is None:
        return Library(None, f"LLORCH_JAX_ISA={os.environ['LLORCH_JAX_ISA']} is not an instruction set of this machine")
    for name in _TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(native, name)), platform="cpu")
    return Library(isa.decode(), "")
