"""Native CPU kernels: arrays in, arrays out, each with a twin in jnp that serves where the library is missing."""

from typing import NamedTuple

from llorch_jax.kernels.library import library


class Description(NamedTuple):
    """Which kernels serve in this process.

    Attributes:
        isa: the instruction set: "portable", "avx2" or "avx512"; None where the jnp twins serve.
        formats: names of the weight formats whose products of a few columns are native.
        reason: why the twins serve; empty where the kernels do.
    """

    isa: str | None
    formats: tuple[str, ...]
    reason: str


def describe() -> Description:
    """Loads the library, if that has not happened yet, and says what came of it."""
    isa, reason, _ = library()
    formats = ("float32", "bfloat16", "float16", "int8", "int8 in groups", "int4 in groups")
    return Description(isa, formats if isa else (), reason)
