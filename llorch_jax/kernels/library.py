"""The shared library of native kernels: found next to this file, loaded once, registered with XLA.

Where it is missing or cannot be used, the jnp twins serve instead, and `reason` says why. Two environment variables
are for tests: LLORCH_JAX_KERNELS=off leaves the library alone, LLORCH_JAX_ISA=portable, avx2 or avx512 chooses an
instruction set.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax

_NAMES = ("_native.so", "_native.dylib", "_native.dll")
_TARGETS = ("llorch_matmul", "llorch_attention")


class Library(NamedTuple):
    """What loading came to.

    Attributes:
        isa: the instruction set in use: "portable", "avx2" or "avx512"; None where the twins serve.
        reason: why the twins serve; empty where the kernels do.
        targets: the custom calls that it has; a library built from older sources may lack some.
    """

    isa: str | None
    reason: str
    targets: frozenset[str] = frozenset()


@cache
def library() -> Library:
    """The library, loaded and registered by the first call of the process."""
    if os.environ.get("LLORCH_JAX_KERNELS", "").lower() == "off":
        return Library(None, "LLORCH_JAX_KERNELS=off")
    path = _path()
    if path is None:
        return Library(None, "the kernels were not built: no C++ compiler was found when the package was installed")
    try:
        return _load(path)
    except Exception as error:  # an unreadable file, or another version of XLA's interface: the twins still serve
        return Library(None, f"{path.name} cannot be loaded: {error}")


def available(target: str) -> bool:
    """Whether programs traced now may call a kernel: it was built, for one CPU device or inside `shard_map`."""
    if jax.default_backend() != "cpu" or library().isa is None or target not in library().targets:
        return False
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


def _path() -> Path | None:
    here = Path(__file__).parent
    return next((here / name for name in _NAMES if (here / name).exists()), None)


def _load(path: Path) -> Library:
    native = ctypes.CDLL(str(path))
    native.llorch_isa.restype = ctypes.c_char_p
    isa = native.llorch_isa()
    if isa is None:
        return Library(None, f"LLORCH_JAX_ISA={os.environ['LLORCH_JAX_ISA']} is not an instruction set of this machine")
    targets = frozenset(name for name in _TARGETS if hasattr(native, name))
    for name in targets:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(native, name)), platform="cpu")
    return Library(isa.decode(), "", targets)
