"""The time of a decode step on many hosts: a cost model fitted to one host, and the networks between them.

    step = bytes read / memory bandwidth + blocks x cost of a block + collectives x latency
           + bytes moved / network bandwidth + calls x cost of a call
           (+ arithmetic of many columns, as far as it does not hide behind the reading)

`FITTED` holds milliseconds of one device from benchmarks/RESULTS.md, section "Scaling, on paper"; `fit` finds the
bandwidth and the cost of a block by least squares of relative errors. `scaling_counts` has the bytes and collectives.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from benchmarks.scaling_counts import BYTES, cut_elements, degrees, outer_elements, whole_elements, with_enough_heads
from llorch_jax.config import GPT2Config

CONTEXT = 72  # mean number of tokens in the cache in the measured steps
CALL = 1.4e-3  # seconds per call of a step from Python: docs/performance.md
MOST_FEW = 16  # columns up to which products are native
_FLOAT = 4


def narrow(width: int, layers: int) -> GPT2Config:
    """GPT-2 small with another width and depth."""
    return GPT2Config(n_embd=width, n_head=width // 64, n_layer=layers)


MODELS = {
    "gpt2": narrow(768, 12),
    "gpt2 with 24 layers": narrow(768, 24),
    "gpt2 with 36 layers": narrow(768, 36),
    "width 256, 12 layers": narrow(256, 12),
    "width 256, 48 layers": narrow(256, 48),
    "width 512, 24 layers": narrow(512, 24),
    "gpt2-medium": narrow(1024, 24),
    "distilgpt2": narrow(768, 6),
    "gpt2-large": narrow(1280, 36),
}
FITTED = {
    "gpt2": 16.45,
    "gpt2 with 24 layers": 31.74,
    "gpt2 with 36 layers": 39.29,
    "width 256, 12 layers": 3.06,
    "width 256, 48 layers": 9.16,
    "width 512, 24 layers": 12.36,
    "gpt2-medium": 50.58,
}
HELD_OUT = {"distilgpt2": 8.28, "gpt2-large": 120.79}  # not fitted: the model is checked with them
BATCHES = {2: 14.02, 4: 17.72, 8: 28.31, 16: 44.72}  # gpt2, ms per step by rows
PREFILLS = {64: 76.31, 128: 147.34, 256: 295.05, 512: 617.11}  # gpt2, ms by tokens


@dataclasses.dataclass(frozen=True)
class Host:
    """A host as the model sees it.

    Attributes:
        name: what it is.
        bandwidth: bytes per second that a step reads from memory.
        block: seconds per block in addition.
        call: seconds per call of a step.
        few: floating-point operations per second of steps with up to 16 columns.
        many: the same for prompts of more tokens.
        hidden: the part of the time of reading behind which the arithmetic hides.
        memory: bytes.
    """

    name: str
    bandwidth: float
    block: float
    call: float
    few: float
    many: float
    hidden: float
    memory: float


class Network(NamedTuple):
    """A network between hosts.

    Attributes:
        name: what it is, and which library adds up.
        latency: seconds that a small message takes one way.
        bandwidth: bytes per second in each direction.
        ring: whether all-reduces always go around a ring, as those of gloo in XLA do; otherwise the best way is taken.
    """

    name: str
    latency: float
    bandwidth: float
    ring: bool


NETWORKS = (
    Network("10 GbE, gloo", 25e-6, 1.25e9, True),
    Network("100 GbE, gloo", 25e-6, 12.5e9, True),
    Network("100 GbE RoCE, MPI", 2e-6, 12.5e9, False),
    Network("InfiniBand NDR, MPI", 1.1e-6, 50e9, False),
)


class Plan(NamedTuple):
    """How many ways a model is spread: copies of it, parts of its heads, and stages of its blocks."""

    data: int
    tensor: int
    stages: int


def read_bytes(config: GPT2Config, batch: int, context: float, dtype: str = "float32", tensor: int = 1) -> float:
    """Bytes that one of `tensor` devices must read in a decode step: weights, and keys and values of live tokens."""
    config = with_enough_heads(config, tensor)
    blocks = config.n_layer * (cut_elements(config) // tensor + whole_elements(config))
    outer = (config.vocab_size + 2) * config.n_embd
    cache = 2 * _FLOAT * config.cache_layers * (config.kv_heads // tensor) * config.head_dim
    return BYTES[dtype] * (blocks + outer) + batch * context * cache


def block_flops(config: GPT2Config, tensor: int = 1) -> float:
    """Floating-point operations of one token in all blocks of one of `tensor` devices, without attention."""
    return 2.0 * config.n_layer * cut_elements(with_enough_heads(config, tensor)) / tensor


def column_flops(config: GPT2Config, tensor: int = 1) -> float:
    """The same with the output projection, which is whole on every device."""
    return block_flops(config, tensor) + 2.0 * config.vocab_size * config.n_embd


def fit(memory: float = 24e9) -> Host:
    """This machine: least squares of relative errors over `FITTED`, then the arithmetic of further columns."""
    names = list(FITTED)
    ms = np.array([FITTED[name] for name in names])
    features = np.array([[MODELS[name].n_layer, read_bytes(MODELS[name], 1, CONTEXT)] for name in names])
    (block, byte), *_ = np.linalg.lstsq(features / ms[:, None], np.ones(len(names)), rcond=None)
    config = MODELS["gpt2"]
    rows, steps = np.array(list(BATCHES)), np.array(list(BATCHES.values()))
    column, offset = np.polyfit(rows, steps, 1) / 1000
    reading = float(features[names.index("gpt2")] @ (block, byte)) / 1000
    tokens, prefills = np.array(list(PREFILLS)), np.array(list(PREFILLS.values()))
    token = float(np.median(prefills / tokens)) / 1000
    return Host(
        "this machine, 2 virtual cores",
        bandwidth=1000 / float(byte),
        block=float(block) / 1000,
        call=CALL,
        few=column_flops(config) / float(column),
        many=block_flops(config) / token,
        hidden=1 - float(offset) / reading,
        memory=memory,
    )


def server(like: Host) -> Host:
    """A socket of 96 Zen 4 cores with 12 channels of DDR5-4800: 80 % of 460.8 GB/s, arithmetic by number of cores."""
    cores = 96 / 2
    return dataclasses.replace(
        like, name="a socket of 96 cores", bandwidth=0.8 * 460.8e9, few=cores * like.few, many=cores * like.many,
        memory=768e9,
    )  # fmt: skip


def device_seconds(host: Host, config: GPT2Config, batch: int, context: float) -> float:
    """Seconds of a decode step in the compiled loop of one device."""
    reading = read_bytes(config, batch, context) / host.bandwidth + config.n_layer * host.block
    return _with_arithmetic(host, reading, batch * column_flops(config))


def _with_arithmetic(host: Host, reading: float, flops: float) -> float:
    """Seconds of reading, and of the arithmetic of a few columns that does not hide behind it."""
    return reading + max(0.0, flops / host.few - host.hidden * reading)


def prefill_seconds(host: Host, config: GPT2Config, tokens: int, context: float) -> float:
    """Seconds of a prompt's next `tokens` tokens on one device, `context` of them in the cache before."""
    if tokens > MOST_FEW:
        attention = 4.0 * config.n_layer * config.n_embd * (context + tokens / 2)
        return max(tokens * (block_flops(config) + attention) / host.many, device_seconds(host, config, 1, context))
    flops = tokens * block_flops(config) + 2.0 * config.vocab_size * config.n_embd
    return _with_arithmetic(host, device_seconds(host, config, 1, context), flops)


def all_reduce(network: Network, hosts: int, size: float) -> float:
    """Seconds of adding up `size` bytes of each host: around a ring, or by recursive doubling where that is faster.

    Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.
    """
    if hosts == 1:
        return 0.0
    ring = 2 * (hosts - 1) * (network.latency + size / hosts / network.bandwidth)
    doubling = math.ceil(math.log2(hosts)) * (network.latency + size / network.bandwidth)
    return ring if network.ring else min(ring, doubling)


def token_seconds(
    host: Host,
    network: Network,
    config: GPT2Config,
    plan: Plan,
    batch: int = 1,
    context: float = 512,
    dtype: str = "float32",
    cut_output: bool = False,
) -> float:
    """Seconds until each of `batch` rows has its next token.

    Args:
        host: each host.
        network: the network between them.
        config: the model.
        plan: how it is spread; copies do not exchange anything.
        batch: rows that one copy computes at once.
        context: tokens in the cache, per row.
        dtype: of the weights.
        cut_output: whether the rows of the output projection are cut over `plan.tensor` too, which the library does not
            do: it costs one more collective, of each device's best candidate per row.
    """
    tensor = plan.tensor
    read = read_bytes(config, batch, context, dtype, tensor)
    flops = batch * column_flops(config, tensor)
    exchanged = 2 * config.n_layer * all_reduce(network, tensor, _FLOAT * config.n_embd * batch)
    if cut_output:
        elsewhere = config.vocab_size * config.n_embd * (1 - 1 / tensor)
        read -= BYTES[dtype] * elsewhere
        flops -= batch * 2 * elsewhere
        exchanged += all_reduce(network, tensor, 8 * batch * tensor)
    hop = network.latency + _FLOAT * config.n_embd * batch / network.bandwidth
    hops = plan.stages * hop if plan.stages > 1 else 0.0
    reading = read / host.bandwidth + config.n_layer * host.block
    return _with_arithmetic(host, reading, flops) + exchanged + hops + plan.stages * host.call


def tokens_per_second(
    host: Host, network: Network, config: GPT2Config, plan: Plan, batch: int, context: float, dtype: str
) -> float:
    """Tokens per second of all copies, each with as many batches in flight as it has stages."""
    return plan.data * plan.stages * batch / token_seconds(host, network, config, plan, batch, context, dtype)


def held_bytes(config: GPT2Config, plan: Plan, batch: int, capacity: int, dtype: str) -> float:
    """Bytes on the fullest host: its stage's blocks, the tables, and the caches of all batches in flight."""
    config = with_enough_heads(config, plan.tensor)
    layers = config.n_layer / plan.stages
    weights = layers * (cut_elements(config) // plan.tensor + whole_elements(config)) + outer_elements(config)
    slot = 2 * _FLOAT * (config.kv_heads // plan.tensor) * config.head_dim
    return BYTES[dtype] * weights + plan.stages * batch * capacity * layers * slot


def plans(host: Host, config: GPT2Config, hosts: int, batch: int, capacity: int, dtype: str) -> list[Plan]:
    """The ways to spread a model over up to `hosts` hosts with enough memory."""
    found = []
    for tensor in degrees(config, hosts):
        for stages in range(1, hosts // tensor + 1):
            plan = Plan(hosts // (tensor * stages), tensor, stages)
            fits = held_bytes(config, plan, batch, capacity, dtype) <= host.memory
            if config.n_layer % stages == 0 and fits:
                found.append(plan)
    return found
