"""The limits of the machine, measured in the rounds of a benchmark, and the floors that follow from them.

A decode step reads every weight except the position embeddings, and the keys and values of the live tokens, at least
once: its floor is those bytes divided by the bandwidth of large matrix-vector products. A prefill's floor is its number
of floating-point operations divided by the speed of a large matrix product.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import llorch_jax as lj
from benchmarks.measure import seconds
from llorch_jax.params import nbytes

BANDWIDTH, GEMM = "limit: GB/s", "limit: GFLOP/s"


class Limits(NamedTuple):
    """Measures the machine once per call.

    Attributes:
        bandwidth: GB/s at which XLA streams matrices of 512 MiB in total through matrix-vector products.
        gemm: GFLOP/s of a product of two square matrices with 2,048 rows.
    """

    bandwidth: Callable[[], float]
    gemm: Callable[[], float]

    @classmethod
    def of(cls, preset: str) -> "Limits":
        """The tasks with their matrices; small ones for the preset "tiny"."""
        rows, size = (256, 128) if preset == "tiny" else (8192, 2048)
        streamed = [jnp.ones((rows, rows)) for _ in range(2)]
        vector = jnp.ones(rows)
        stream = jax.jit(lambda matrices, vector: [matrix @ vector for matrix in matrices])
        square = jnp.ones((size, size))
        product = jax.jit(jnp.matmul)
        return cls(
            lambda: 2 * 4e-9 * rows**2 / min(seconds(lambda: stream(streamed, vector)) for _ in range(2)),
            lambda: 2e-9 * size**3 / min(seconds(lambda: product(square, square)) for _ in range(2)),
        )

    def tasks(self) -> dict[str, Callable[[], float]]:
        """Both, as tasks of `interleaved`."""
        return {BANDWIDTH: self.bandwidth, GEMM: self.gemm}


def kv_bytes(config: lj.GPT2Config) -> int:
    """Bytes of one token's keys and values in all layers in float32."""
    return 2 * 4 * config.cache_layers * config.kv_heads * config.head_dim


def step_bytes(config: lj.GPT2Config, params: lj.Params, batch: int, context: float) -> float:
    """Bytes that a decode step must read: the weights it uses, and each row's live keys and values."""
    return nbytes(params) - params.wpe.nbytes + batch * context * kv_bytes(config)


def prefill_flops(config: lj.GPT2Config, batch: int, count: int) -> float:
    """Floating-point operations of a prefill with logits for the last position only."""
    width = config.n_embd
    kv_width = config.kv_heads * config.head_dim
    dense = width * (2 * width + 2 * kv_width + 2 * config.inner_dim)
    attention = 2 * width * (count + 1) / 2
    return 2.0 * batch * (count * config.n_layer * (dense + attention) + width * config.vocab_size)


def step_floors(values: dict[str, list[float]], size: float) -> list[float]:
    """Milliseconds that reading `size` bytes takes at the bandwidth of each round."""
    return [size / bandwidth / 1e6 for bandwidth in values[BANDWIDTH]]


def prefill_floors(values: dict[str, list[float]], flops: float) -> list[float]:
    """Milliseconds that `flops` operations take at the speed of each round."""
    return [flops / speed / 1e6 for speed in values[GEMM]]
