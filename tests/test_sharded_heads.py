"""A decode step whose heads are spread over devices: what they have to tell each other, and the same logits."""

import json
import os
import subprocess
import sys

SCRIPT = """
import collections, json, re
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import llorch_jax as lj
from llorch_jax.decoding import steps

FIELDS = {"vocab_size": 64, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": 128}
COLLECTIVE = r" (all-\\w+|collective-\\w+|reduce-scatter)(?:-start)?\\("
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
rows, columns = P("model"), P(None, "model")

def spec(path, leaf):
    name = jax.tree_util.keystr(path)
    if "qkv" in name or "fc" in name:
        return rows
    if name.endswith(("attn_proj.weight", "mlp_proj.weight")):
        return columns
    return columns if leaf.ndim == 4 else P()  # of the cache: keys and values [B, K, S, H]

def spread(tree):
    return jax.tree_util.tree_map_with_path(lambda p, x: jax.device_put(x, NamedSharding(mesh, spec(p, x))), tree)

prompt = np.arange(10, dtype=np.int32).reshape(2, 5)
step = jax.jit(steps.decode.__wrapped__, static_argnums=1)
out = []
for kv_heads, batch in ((4, 1), (8, 2)):
    config = lj.GPT2Config(**FIELDS, num_kv_heads=kv_heads)
    params = jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, lj.init_params(config, jax.random.key(0)))
    cache = lj.StaticCache.init(config, batch_size=batch, capacity=16)
    _, cache = lj.prefill(params, config, prompt[:batch], cache)
    token = np.array([3, 4], np.int32)[:batch]
    expected, _ = step(params, config, token, cache)
    compiled = step.lower(spread(params), config, token, spread(cache)).compile()
    logits, after = compiled(spread(params), token, spread(cache))
    out.append({
        "collectives": collections.Counter(re.findall(COLLECTIVE, compiled.as_text())),
        "error": float(np.abs(logits - expected).max()),
        "spread": all(x.sharding.spec == columns for x in jax.tree.leaves(after) if x.ndim == 4),
    })
print(json.dumps(out))
"""


def test_a_step_sharded_by_heads_adds_up_twice_per_layer_and_moves_nothing_else():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared_and_single_heads = json.loads(done.stdout)
    assert len(shared_and_single_heads) == 2
    for step in shared_and_single_heads:
        assert step["collectives"] == {"all-reduce": 4}  # two layers
        assert step["error"] < 1e-4
        assert step["spread"]
