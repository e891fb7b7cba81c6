"""Native CPU kernels: arrays in, arrays out, each with a twin in jnp that is used if the library is missing."""

from typing import NamedTuple

from llorch_jax.kernels.library import library


class Description(NamedTuple):
    """Which kernels this process uses.

    Attributes:
        isa: the instruction set: "portable", "avx2" or "avx512"; None if the jnp twins are used.
        formats: names of the weight formats whose products with a few columns are native.
        reason: why the twins are used; empty if the kernels are.
    """

    isa: str | None
    formats: tuple[str, ...]
    reason: str


def describe() -> Description:
    """Loads the library, unless it has been loaded already, and describes the outcome."""
    isa, reason = library()
    formats = ("float32", "bfloat16", "float16", "int8", "w8a8", "int8 in groups", "int4 in groups")
    return Description(isa, formats if isa else (), reason)
