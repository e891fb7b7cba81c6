"""Decode steps with one part left out: what the part costs in its place is the difference to the whole step.

The programs are the library's own step (`steps.next_state`) on other values: a cache that does not write, or
that shows a single slot; a model whose feed-forward layers are one wide, or that knows 16 words; a sampler that does
not look. They are called one after the other without waiting, so that calls overlap with computing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

import llorch_jax as lj
from benchmarks.measure import seconds
from llorch_jax.decoding import steps
from llorch_jax.linear import dense

_step = jax.jit(steps.next_state, static_argnames="config", donate_argnames="state")


class StepProgram:
    """A compiled decode step that is run on from the state that it was made for."""

    def __init__(self, params: lj.Params, config: lj.GPT2Config, policy: Any, state: steps.DecodeState) -> None:
        """Compiles the step; the state is copied, and its cache must have room for all steps to come."""
        self.params, self.policy, self.state = params, policy, jax.tree.map(jnp.array, state)
        self._compiled = _step.lower(params, config, policy, self.state).compile()

    def step_ms(self, count: int) -> float:
        """Milliseconds per step of so many steps in a row."""

        def run() -> steps.DecodeState:
            for _ in range(count):
                self.state = self._compiled(self.params, self.policy, self.state)
            return self.state

        return 1000 * seconds(run) / count

    def allocated(self) -> int:
        """Bytes that a call takes besides what it is given: scratch memory, and results not in donated buffers."""
        sizes = self._compiled.memory_analysis()
        return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def without_update(cache: lj.KVCache) -> lj.KVCache:
    """The cache, but it does not write what it is given."""
    return _variant(cache, {"_write": lambda self, layer, k, v, count: self})


def with_one_slot(cache: lj.KVCache) -> lj.KVCache:
    """The cache, but it does not write, and queries see its first slot only."""

    def read(self: Any, layer: int) -> Any:
        view = type(cache).read(self, layer)
        return view._replace(k=view.k[:, :, :1], v=view.v[:, :, :1], positions=view.positions[:, :1])

    return _variant(cache, {"_write": lambda self, layer, k, v, count: self, "read": read})


def _variant(cache: lj.KVCache, methods: dict[str, Callable]) -> lj.KVCache:
    """The same values in a subclass with other methods."""
    cls = struct.dataclass(type(f"Partial{type(cache).__name__}", (type(cache),), methods))
    return cls(**{field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)})


def slots_of(cache: lj.KVCache) -> int:
    """How many slots per row the queries of a step look at."""
    return jax.eval_shape(lambda each: each.read(0), cache).k.shape[2]


def without_ffn(config: lj.GPT2Config, params: lj.Params) -> tuple[lj.GPT2Config, lj.Params]:
    """The model with feed-forward layers one wide."""

    def narrow(block: lj.BlockParams) -> lj.BlockParams:
        fc = block.fc.replace(weight=block.fc.weight[:1], bias=block.fc.bias[:1])
        return block.replace(fc=fc, mlp_proj=block.mlp_proj.replace(weight=block.mlp_proj.weight[:, :1]))

    return dataclasses.replace(config, n_inner=1), params.replace(blocks=tuple(map(narrow, params.blocks)))


def without_head(config: lj.GPT2Config, params: lj.Params) -> tuple[lj.GPT2Config, lj.Params]:
    """The model with logits for 16 words only."""
    config = dataclasses.replace(config, tie_word_embeddings=False)
    return config, params.replace(lm_head=params.output_projection[:16])


@struct.dataclass
class FirstWord:
    """The sampler that always takes word 0."""

    needs_key = False

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.zeros(logits.shape[0], jnp.int32)


def dense_ms(params: lj.Params, batch: int, names: Sequence[str]) -> Callable[[], float]:
    """Measures milliseconds of the named dense layers of all blocks in turn, on one column per row of the batch.

    Each takes the rows of the one before that it has inputs for, repeated where there are too few.
    """
    layers = [[getattr(block, name) for name in names] for block in params.blocks]

    @jax.jit
    def run(layers: Any, x: jax.Array) -> jax.Array:
        for block in layers:
            for layer in block:
                width = layer.weight.shape[1]
                x = dense(layer, jnp.tile(x, (-(-width // x.shape[0]), 1))[:width])
        return x

    x = jnp.ones((params.wte.shape[1], batch))
    return lambda: 1000 * seconds(lambda: run(layers, x))
