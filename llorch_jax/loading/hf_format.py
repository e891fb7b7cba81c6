"""How Hugging Face checkpoints store a GPT-2: families, and their tensors' names, shapes, orientation and row order."""

import dataclasses
from typing import Any

import numpy as np

from llorch_jax.config import GPT2Config
from llorch_jax.linear import Dense, Norm
from llorch_jax.params import BlockParams, Params

# Transformers' class for each family; it has none for the last one, which only this package reads and writes.
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "gpt_bigcode": "GPTBigCodeForCausalLM", "llorch_gpt2": None}

EMBEDDING, HEAD = "wte.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A parameter as a checkpoint stores it.

    Attributes:
        name: Hugging Face's name, without the `transformer.` prefix.
        shape: as stored.
        transposed: whether it is stored as [in, out].
        heads: indices of the stored heads in the order of the parameter's rows; empty if the order is the same.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    heads: tuple[int, ...] = ()

    def to_param(self, stored: np.ndarray) -> np.ndarray:
        """The parameter, as `Params` holds it, from the stored array; a view if possible."""
        ordered = _with_heads(stored, self.heads, self._out_axis)
        return ordered.T if self.transposed else ordered

    def from_param(self, param: np.ndarray) -> np.ndarray:
        """The inverse of `to_param`."""
        stored = param.T if self.transposed else param
        return _with_heads(stored, tuple(np.argsort(self.heads)), self._out_axis)

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def _out_axis(self) -> int:
        return len(self.shape) - 1 if self.transposed else 0


def _with_heads(array: np.ndarray, order: tuple[int, ...], axis: int) -> np.ndarray:
    """An array whose axis consists of equal parts, one per head, with these parts in another order."""
    if not order:
        return array
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    by_head = array.reshape(*before, len(order), -1, *after)
    return by_head.take(order, axis).reshape(array.shape)


def family_of(config: GPT2Config) -> str:
    """The family as which a model is written: one for which transformers gives the same results, if any.

    In transformers, gpt2 has one key/value head per query head, gpt_bigcode has a single one and no scaling by layer;
    neither has a sliding window or blocks that share keys and values.
    """
    if config.sliding_window is not None or config.cache_layers < config.n_layer:
        return "llorch_gpt2"
    if config.kv_heads == config.n_head:
        return "gpt2"
    multi_query = config.kv_heads == 1 and not config.scale_attn_by_inverse_layer_idx
    return "gpt_bigcode" if multi_query else "llorch_gpt2"


def hf_fields(config: GPT2Config, family: str, dtype: str) -> dict[str, Any]:
    """The contents of a `config.json` from which `GPT2Config.from_hf_dict` makes an equivalent configuration."""
    fields: dict[str, Any] = {"model_type": family, "dtype": dtype, **dataclasses.asdict(config)}
    if ARCHITECTURES[family]:
        fields["architectures"] = [ARCHITECTURES[family]]
        del fields["num_kv_heads"], fields["sliding_window"], fields["kv_sharing"]
    if family == "gpt_bigcode":
        fields["multi_query"] = config.kv_heads == 1
    return fields


def stored_tensors(config: GPT2Config, family: str) -> Params:
    """`Params` with a `StoredTensor` in place of each array.

    GPT-BigCode stores dense weights as [out, in] (Linear), the other families as [in, out] (Conv1D). Its query, key
    and value rows are ordered by key/value head, as `Params` has them; the others store all queries, all keys, then
    all values.
    """
    vocab = (config.vocab_size, config.n_embd)
    return Params(
        wte=_stored(EMBEDDING, vocab),
        wpe=_stored("wpe.weight", (config.n_positions, config.n_embd)),
        blocks=tuple(_block(config, family == "gpt_bigcode", f"h.{layer}") for layer in range(config.n_layer)),
        ln_f=_norm("ln_f", config.n_embd),
        lm_head=None if config.tie_word_embeddings else _stored(HEAD, vocab),
    )


def _block(config: GPT2Config, linear: bool, name: str) -> BlockParams:
    width, inner = config.n_embd, config.inner_dim
    qkv_rows = (config.n_head + 2 * config.kv_heads) * config.head_dim
    heads = () if linear else grouped_heads(config)
    return BlockParams(
        ln_1=_norm(f"{name}.ln_1", width),
        qkv=_dense(f"{name}.attn.c_attn", qkv_rows, width, linear, heads),
        attn_proj=_dense(f"{name}.attn.c_proj", width, width, linear),
        ln_2=_norm(f"{name}.ln_2", width),
        fc=_dense(f"{name}.mlp.c_fc", inner, width, linear),
        mlp_proj=_dense(f"{name}.mlp.c_proj", width, inner, linear),
    )


def grouped_heads(config: GPT2Config) -> tuple[int, ...]:
    """Heads of [queries, keys, values] in the order of `BlockParams.qkv`; empty where that is the same."""
    first_key = config.n_head
    first_value = config.n_head + config.kv_heads
    queries = config.n_head // config.kv_heads
    order: list[int] = []
    for group in range(config.kv_heads):
        order += range(group * queries, (group + 1) * queries)
        order += (first_key + group, first_value + group)
    return () if order == sorted(order) else tuple(order)


def _stored(*arguments: Any, **settings: Any) -> Any:
    return StoredTensor(*arguments, **settings)  # typed Any because the fields of `Params` are declared as arrays


def _norm(name: str, width: int) -> Norm:
    return Norm(weight=_stored(f"{name}.weight", (width,)), bias=_stored(f"{name}.bias", (width,)))


def _dense(name: str, rows: int, columns: int, linear: bool, heads: tuple[int, ...] = ()) -> Dense:
    shape = (rows, columns) if linear else (columns, rows)
    return Dense(
        weight=_stored(f"{name}.weight", shape, transposed=not linear, heads=heads),
        bias=_stored(f"{name}.bias", (rows,), heads=heads),
    )
