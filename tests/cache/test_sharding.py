"""A cache sharded by rows stays where it is: a decode step moves new tokens between devices, and never a cache."""

import os
import re
import subprocess
import sys

SCRIPT = """
import jax, jax.numpy as jnp
import llorch_jax as lj
from llorch_jax.cache import axes
from llorch_jax.decoding import steps

config = lj.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
place = lambda value, names: jax.device_put(
    value, jax.NamedSharding(mesh, jax.P(*["data" if name == "B" else None for name in names]))
)
params = jax.tree.map(lambda leaf: place(leaf, ""), lj.init_params(config, jax.random.key(0)))
token = place(jnp.zeros(4, jnp.int32), "B")
for layout, codec in (("static", "int8"), ("rotating:9+2", None), ("h2o:9", "int4")):
    cache = lj.make_cache(config, layout, batch_size=4, codec=codec)
    cache = jax.tree.map(place, cache, axes.axes_of(cache))
    print(steps.decode.lower(params, config, token, cache).compile().as_text())
"""


def test_a_decode_step_sharded_by_rows_gathers_no_slots():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", done.stdout)
    shapes = {tuple(map(int, shape.split(","))) for shape in moved}
    assert shapes, "expected the new tokens to be gathered, or this test looks for the wrong instructions"
    # Slots are the third axis: 32 of the static cache and of its float window, 11 of the ring, 41 with slack.
    assert {shape[2] for shape in shapes if len(shape) == 4} == {1}
