"""The parameters of a GPT-2 as a pytree of arrays.

Dense weights are output-major, [out, in]: XLA's CPU backend multiplies `W[N, K] @ x[K, M]` two times faster than
`x @ W` for the few columns M of a decode step. A block's query, key and value projections are the rows of one matrix,
ordered by key/value head, so that a device that holds some of the heads holds consecutive rows.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llorch_jax.config import GPT2Config
from llorch_jax.linear import Dense, Matrix, Norm, QuantizedMatrix


@struct.dataclass
class BlockParams:
    """One transformer block.

    Attributes:
        ln_1: norm before attention.
        qkv: [(N + 2K) * H, D]; for each key/value head in turn the rows of the N / K query heads that attend to it,
            of its key, and of its value.
        attn_proj: [D, N * H].
        ln_2: norm before the feed-forward layer.
        fc: [inner, D].
        mlp_proj: [D, inner].
    """

    ln_1: Norm
    qkv: Dense
    attn_proj: Dense
    ln_2: Norm
    fc: Dense
    mlp_proj: Dense


@struct.dataclass
class Params:
    """All parameters of a model.

    Attributes:
        wte: token embedding [V, D].
        wpe: position embedding [P, D].
        blocks: L blocks.
        ln_f: final norm.
        lm_head: output projection [V, D]; None if it is tied to `wte`.
        mesh: the devices over which `sharding.shard` has spread the arrays; None on one device. Static, so that every
            compiled program knows it.
    """

    wte: Matrix
    wpe: jax.Array
    blocks: tuple[BlockParams, ...]
    ln_f: Norm
    lm_head: Matrix | None = None
    mesh: jax.sharding.Mesh | None = struct.field(pytree_node=False, default=None)

    @property
    def output_projection(self) -> Matrix:
        """The matrix [V, D] that turns the last hidden state into logits."""
        return self.wte if self.lm_head is None else self.lm_head


def init_params(config: GPT2Config, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters as GPT-2 initialises them (Radford et al. 2019, section 2.3).

    Weights are normal with standard deviation 0.02, the two projections into the residual stream scaled by
    1 / sqrt(2L); biases are 0 and norms the identity.

    Args:
        config: the model's hyperparameters.
        key: a `jax.random.key`.
        dtype: of every array.
    """
    wte_key, wpe_key, head_key, *block_keys = jax.random.split(key, 3 + config.n_layer)
    width = config.n_embd
    return Params(
        wte=_normal(wte_key, (config.vocab_size, width), dtype),
        wpe=_normal(wpe_key, (config.n_positions, width), dtype),
        blocks=tuple(_init_block(config, block_key, dtype) for block_key in block_keys),
        ln_f=_identity_norm(width, dtype),
        lm_head=None if config.tie_word_embeddings else _normal(head_key, (config.vocab_size, width), dtype),
    )


def param_shapes(config: GPT2Config, dtype: Any = jnp.float32) -> Params:
    """The parameters' shapes and dtypes as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    # All blocks have the same shapes, and tracing thousands of them would take minutes.
    one = dataclasses.replace(config, n_layer=1, kv_sharing=None)
    shapes = jax.eval_shape(lambda key: init_params(one, key, dtype), jax.random.key(0))
    return dataclasses.replace(shapes, blocks=shapes.blocks * config.n_layer)


def count_params(tree: Any) -> int:
    """Number of parameters in a pytree of arrays or shapes; a tied output projection counts once.

    A quantized matrix counts as the matrix that it represents.
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def nbytes(tree: Any) -> int:
    """Bytes of a pytree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _init_block(config: GPT2Config, key: jax.Array, dtype: Any) -> BlockParams:
    width, head_dim = config.n_embd, config.head_dim
    qkv_key, proj_key, fc_key, down_key = jax.random.split(key, 4)
    into_residual = 0.02 / (2 * config.n_layer) ** 0.5
    qkv_rows = (config.n_head + 2 * config.kv_heads) * head_dim
    return BlockParams(
        ln_1=_identity_norm(width, dtype),
        qkv=_dense(qkv_key, qkv_rows, width, dtype),
        attn_proj=_dense(proj_key, width, width, dtype, into_residual),
        ln_2=_identity_norm(width, dtype),
        fc=_dense(fc_key, config.inner_dim, width, dtype),
        mlp_proj=_dense(down_key, width, config.inner_dim, dtype, into_residual),
    )


def _dense(key: jax.Array, rows: int, columns: int, dtype: Any, std: float = 0.02) -> Dense:
    return Dense(weight=_normal(key, (rows, columns), dtype, std), bias=jnp.zeros(rows, dtype))


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float = 0.02) -> jax.Array:
    return std * jax.random.normal(key, shape, dtype)


def _identity_norm(width: int, dtype: Any) -> Norm:
    return Norm(weight=jnp.ones(width, dtype), bias=jnp.zeros(width, dtype))
