"""What a tensor-parallel decode step costs each device: counted in the compiled program, and by formula.

A child process with virtual devices compiles the library's own step for them, of a model that lies where `shard` puts
it ([docs/scaling.md](../docs/scaling.md) says what is cut). Only shapes are compiled, no array is made, so that models
larger than this machine are counted as well.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import hlo
from llorch_jax.config import GPT2Config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT = 4  # bytes of what devices add up, and of keys and values: float32 whatever the weights are


class Case(NamedTuple):
    """A decode step on several devices.

    Attributes:
        config: the model.
        devices: number of devices that share the heads.
        batch: number of rows.
        capacity: slots of the static cache.
        dtype: of the weights.
    """

    config: GPT2Config
    devices: int
    batch: int = 1
    capacity: int = 128
    dtype: str = "float32"


class Counts(NamedTuple):
    """What one device holds, and what it exchanges in one step.

    Attributes:
        held: bytes of the step's arguments: weights, cache, lengths and tokens.
        collectives: number of operations for which devices exchange data.
        payload: bytes of their results in all.
    """

    held: int
    collectives: int
    payload: int


def with_enough_heads(config: GPT2Config, devices: int) -> GPT2Config:
    """The model as `devices` devices hold it: where it has fewer key/value heads than that, they are repeated."""
    return dataclasses.replace(config, num_kv_heads=max(config.kv_heads, devices))


def degrees(config: GPT2Config, most: int) -> list[int]:
    """The numbers of devices, up to `most`, that can share the heads of a model."""
    return [
        count
        for count in range(1, most + 1)
        if config.n_head % count == 0
        and config.inner_dim % count == 0
        and (config.kv_heads % count == 0 or count % config.kv_heads == 0)
    ]


def cut_elements(config: GPT2Config) -> int:
    """Number of one block's parameters that are cut: two matrices by rows with their biases, two by columns."""
    width, inner = config.n_embd, config.inner_dim
    qkv = (config.n_head + 2 * config.kv_heads) * config.head_dim
    return qkv * (width + 1) + inner * (width + 1) + width * width + width * inner


def whole_elements(config: GPT2Config) -> int:
    """Number of one block's parameters that are on every device: two norms, and the biases of two projections."""
    return 6 * config.n_embd


def outer_elements(config: GPT2Config) -> int:
    """Number of the parameters outside the blocks, which are on every device."""
    tables = 1 if config.tie_word_embeddings else 2
    return (tables * config.vocab_size + config.n_positions + 2) * config.n_embd


def by_formula(case: Case) -> Counts:
    """`compiled` without a compiler."""
    config, devices = with_enough_heads(case.config, case.devices), case.devices
    blocks = config.n_layer * (cut_elements(config) // devices + whole_elements(config))
    weights = BYTES[case.dtype] * (blocks + outer_elements(config))
    heads = config.kv_heads // devices
    cache = 2 * _FLOAT * config.cache_layers * case.batch * heads * case.capacity * config.head_dim
    lengths_and_tokens = 2 * 4 * case.batch
    collectives = 2 * config.n_layer if devices > 1 else 0
    return Counts(weights + cache + lengths_and_tokens, collectives, collectives * _FLOAT * config.n_embd * case.batch)


def compiled(cases: Sequence[Case]) -> list[Counts]:
    """What the compiled programs hold and exchange; compiled by a child process with virtual devices."""
    most = max(case.devices for case in cases)
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={most}", "JAX_PLATFORMS": "cpu"}
    texts = [{**case._asdict(), "config": dataclasses.asdict(case.config)} for case in cases]
    command = [sys.executable, "-m", "benchmarks.scaling_counts"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, input=json.dumps(texts), env=env, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting: the child process ended with {done.returncode}: {done.stderr[-2000:]}")
    return [Counts(*each) for each in json.loads(done.stdout)]


def _compile(case: Case) -> str:
    """The text of the compiled step, of shapes that lie where `shard` and `new_cache` would put arrays."""
    import jax
    import jax.numpy as jnp

    import llorch_jax as lj
    from llorch_jax.cache.placement import cache_specs
    from llorch_jax.decoding import steps
    from llorch_jax.meshes import check_divisible, param_specs

    config, mesh = with_enough_heads(case.config, case.devices), lj.make_mesh(model=case.devices)
    params = lj.param_shapes(config, jnp.dtype(case.dtype))
    check_divisible(config, params, case.devices)
    cache = jax.eval_shape(lambda: lj.StaticCache.init(config, batch_size=case.batch, capacity=case.capacity))

    def place(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    params = dataclasses.replace(jax.tree.map(place, params, param_specs(params, mesh)), mesh=mesh)
    cache = jax.tree.map(place, cache, cache_specs(cache, mesh, at_rest=True))
    token = place(jax.ShapeDtypeStruct((case.batch,), jnp.int32), jax.sharding.PartitionSpec())
    return steps.decode.lower(params, config, token, cache).compile().as_text()


def main() -> None:
    found = []
    for each in json.load(sys.stdin):
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in each.pop("config").items()}
        text = _compile(Case(GPT2Config(**config), **each))
        exchanged = hlo.collectives(text)
        payload = sum(operation.bytes for operation in exchanged)
        found.append(Counts(hlo.argument_bytes(text), len(exchanged), payload))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
