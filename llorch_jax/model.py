"""The GPT-2 forward pass (Radford et al. 2019): embeddings, pre-norm blocks, final norm, logits.

Activations are feature-major, [D, M] with M = B * T columns, so that every dense layer is `W[out, in] @ x`: see
`params`. Public functions take and return the usual [B, T, ...].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp

from llorch_jax.attention import DenseView, KVView, Queries
from llorch_jax.cache.base import KVCache
from llorch_jax.cache.placement import placed
from llorch_jax.checks import check_append
from llorch_jax.config import GPT2Config
from llorch_jax.linear import dense, layer_norm, matmul, take_rows
from llorch_jax.meshes import HEADS, axis_of
from llorch_jax.params import BlockParams, Params
from llorch_jax.sharding import check_no_probe, over_mesh

Cache = TypeVar("Cache", bound=KVCache)
MaybeCache = TypeVar("MaybeCache", bound=KVCache | None)
Probe = Callable[[str, int, jax.Array], None]  # called with (name, layer, value) while the pass is traced

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Output(NamedTuple, Generic[MaybeCache]):
    """The result of a forward pass.

    Attributes:
        logits: float32 [B, T, V], or [B, V] of each row's last token.
        hidden: float32 [B, T, D], the final hidden states, after the final norm.
        cache: the cache with the new tokens; None if none was given.
    """

    logits: jax.Array
    hidden: jax.Array
    cache: MaybeCache


def ignore(name: str, layer: int, value: jax.Array) -> None:
    """The probe that records nothing."""


@overload
def forward(params: Params, config: GPT2Config, tokens: Any, cache: None = None) -> jax.Array: ...
@overload
def forward(params: Params, config: GPT2Config, tokens: Any, cache: Cache) -> tuple[jax.Array, Cache]: ...
def forward(params: Params, config: GPT2Config, tokens: Any, cache: KVCache | None = None) -> Any:
    """Logits of every token, in float32.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        tokens: int32 [B, T].
        cache: if given, the tokens follow those in the cache. It stays valid, and the new cache is returned. Use
            `prefill` or `decode_step` to update a cache in place.

    Returns:
        float32 [B, T, V]; with a cache, a pair of that and the cache with T more tokens per row.

    Raises:
        TokenError: the tokens are empty, misshapen, not integers, or outside the vocabulary.
        CapacityError: they do not fit the context or the cache.
    """
    tokens, cache = check_append(config, tokens, cache)
    cache = placed(params.mesh, cache)
    logits, cache_after = _forward(params, config, tokens, cache)
    return logits if cache is None else (logits, cache_after)


@partial(jax.jit, static_argnames="config")
def _forward(params: Params, config: GPT2Config, tokens: jax.Array, cache: KVCache | None) -> Any:
    out = run(params, config, tokens, cache)
    return out.logits, out.cache


def run(
    params: Params,
    config: GPT2Config,
    tokens: jax.Array,
    cache: MaybeCache,
    count: jax.Array | None = None,
    *,
    last: bool = False,
    fresh: bool = False,
    probe: Probe = ignore,
) -> Output[MaybeCache]:
    """The forward pass, in `jit`, on which all decoding and scoring is built.

    Args:
        params: the model's parameters.
        config: the model's hyperparameters.
        tokens: int32 [B, T], checked; padding may follow each row's last token.
        cache: earlier tokens, with room reserved, or None.
        count: int32 [B], how many tokens of each row are real; None means all. Results of rows with 0 are meaningless.
        last: whether to return only the logits of each row's last real token.
        fresh: whether the cache is known to be empty: attention is then over these tokens only, in blocks.
        probe: called with intermediate values.

    Returns:
        Logits, hidden states, and the cache with `count` more tokens per row.
    """
    if params.mesh is None:
        return _pass(params, config, tokens, cache, count, last=last, fresh=fresh, probe=probe)
    check_no_probe(probe is not ignore)
    local = partial(_pass, config=config, last=last, fresh=fresh, over=axis_of(params.mesh, HEADS))
    return Output(*over_mesh(config, local, params, tokens, cache, count))


def _pass(
    params: Params,
    config: GPT2Config,
    tokens: jax.Array,
    cache: MaybeCache,
    count: jax.Array | None,
    *,
    last: bool,
    fresh: bool,
    probe: Probe = ignore,
    over: str | None = None,
) -> Output[MaybeCache]:
    """`run` on one device, or on one of a mesh: with its rows of tokens and cache, and its part of the parameters.

    `over` is the mesh axis over which heads and dense layers are spread, if they are.
    """
    x, cache = _hidden_states(params, config, tokens, cache, count, probe, fresh, over)
    if cache is not None:
        cache = cache.advance(tokens.shape[1] if count is None else count)
    chosen, shape = x, tokens.shape
    if last:
        chosen, shape = _last_columns(x, tokens.shape, count), tokens.shape[:1]
    return Output(output_logits(params, chosen, shape), x.T.reshape(*tokens.shape, -1), cache)


def _last_columns(x: jax.Array, shape: tuple[int, ...], count: jax.Array | None) -> jax.Array:
    """The columns [D, B] of each row's last real token, from hidden states [D, B * T]."""
    batch, columns = shape
    by_row = x.reshape(-1, batch, columns)
    if count is None or columns == 1:
        return by_row[..., -1]
    index = jnp.maximum(count - 1, 0)[None, :, None]
    return jnp.take_along_axis(by_row, index, axis=2)[..., 0]


def _hidden_states(
    params: Params,
    config: GPT2Config,
    tokens: jax.Array,
    cache: MaybeCache,
    count: jax.Array | None,
    probe: Probe,
    fresh: bool,
    over: str | None,
) -> tuple[jax.Array, MaybeCache]:
    """float32 [D, B * T], normed; and the cache with these tokens written but not yet counted by `advance`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if cache is not None:
        positions = positions + cache.lengths[:, None]
    # A first pass sees only these tokens, in order.
    start = 0 if cache is None or fresh else None
    queries = Queries(positions, count, config.sliding_window, start)
    x = embed(params, tokens, positions)
    views: dict[int, KVView] = {}
    for layer, block in enumerate(params.blocks):
        with jax.named_scope(f"block_{layer}"):
            x, cache = _block(block, config, layer, x, cache, views, queries, fresh, probe, over)
    return layer_norm(params.ln_f, x, config.layer_norm_epsilon), cache


@jax.named_scope("embedding")
def embed(params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Token plus position embeddings, [D, M]. Positions of padding may lie past the last one, and get any row."""
    words = take_rows(params.wte, tokens.reshape(-1))
    places = take_rows(params.wpe, positions.reshape(-1))
    return (words + places).T


@jax.named_scope("logits")
def output_logits(params: Params, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Logits float32 [*shape, V] of hidden states [D, M], M the product of `shape`."""
    projection = params.output_projection
    logits = matmul(projection, x)  # [V, M]
    if x.shape[1] > 1:  # otherwise XLA rewrites it as x.T @ W.T, which takes up to five times as long
        logits = jax.lax.optimization_barrier(logits)
    return logits.T.reshape(*shape, projection.shape[0])


def _block(
    params: BlockParams,
    config: GPT2Config,
    block: int,
    x: jax.Array,
    cache: MaybeCache,
    views: dict[int, KVView],
    queries: Queries,
    fresh: bool,
    probe: Probe,
    over: str | None,
) -> tuple[jax.Array, MaybeCache]:
    """One pre-norm block on x [D, M]; `views` holds the views of earlier cache layers, for blocks that share them."""
    shape = queries.positions.shape

    def show(name: str, value: jax.Array) -> None:
        probe(name, block, value.T.reshape(*shape, -1))

    normed = layer_norm(params.ln_1, x, config.layer_norm_epsilon)
    show("ln_1", normed)
    q, k, v = _by_kind(dense(params.qkv, normed), config, shape)
    for name, value in (("q", q), ("k", k), ("v", v)):
        probe(name, block, value)
    out, cache = _attention(config, block, q, k, v, cache, views, queries, fresh)
    attended = dense(params.attn_proj, out.transpose(2, 3, 0, 1).reshape(-1, x.shape[1]), over)
    show("attn_out", attended)
    x = x + attended
    hidden = dense(params.fc, layer_norm(params.ln_2, x, config.layer_norm_epsilon))
    fed = dense(params.mlp_proj, _ACTIVATIONS[config.activation_function](hidden), over)
    show("mlp_out", fed)
    x = x + fed
    show("block_out", x)
    return x, cache


def _attention(
    config: GPT2Config,
    block: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: MaybeCache,
    views: dict[int, KVView],
    queries: Queries,
    fresh: bool,
) -> tuple[jax.Array, MaybeCache]:
    """Attention [B, T, N, H] over what the cache shows, and the cache with k and v [B, T, K, H] of these tokens."""
    layer = config.cache_layer(block)
    if config.owns_cache_layer(block):
        if cache is None:
            views[layer] = DenseView(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), queries.positions[:1])
        else:
            cache, views[layer] = cache.append(layer, k, v, queries.count, fresh=fresh)
    scale = config.attention_scale(block)
    if cache is not None:
        with jax.named_scope("cache_update"):
            cache = cache.observe(layer, q, views[layer], queries, scale)
    return views[layer].attend(q, queries, scale), cache


def _by_kind(qkv: jax.Array, config: GPT2Config, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] of the projection's output [(N + 2K) * H, B * T].

    On a mesh these are the heads of one device.
    """
    queries = config.n_head // config.kv_heads
    by_group = qkv.reshape(-1, queries + 2, config.head_dim, *shape)
    q = by_group[:, :queries].reshape(-1, config.head_dim, *shape)
    k = by_group[:, queries]
    v = by_group[:, queries + 1]
    return q.transpose(2, 3, 0, 1), k.transpose(2, 3, 0, 1), v.transpose(2, 3, 0, 1)
