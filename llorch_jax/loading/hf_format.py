"""How Hugging Face checkpoints store a GPT-2: families, and their tensors' names, shapes, orientation and row order."""

import dataclasses
from typing import Any

import numpy as np

from llorch_jax.config import GPT2Config
from llorch_jax.linear import Dense, Norm
from llorch_jax.params import BlockParams, Params

# What transformers calls each family; it has no model for the last one, which only this package reads and writes.
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "gpt_bigcode": "GPTBigCodeForCausalLM", "llorch_gpt2": None}

EMBEDDING, HEAD = "wte.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A parameter as a checkpoint stores it.

    Attributes:
        name: Hugging Face's, without the `transformer.` prefix.
        shape: as stored.
        transposed: it is stored as [in, out].
        interleaved: number of heads where the rows run head by head, each with its query, key and value; otherwise 1,
            and all queries come first, then all keys, then all values.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    interleaved: int = 1

    def to_param(self, stored: np.ndarray) -> np.ndarray:
        """The parameter, as `Params` holds it, of the stored array; a view of it where that is possible."""
        array = stored.T if self.transposed else stored
        if self.interleaved == 1:
            return array
        by_head = array.reshape(self.interleaved, 3, -1, *array.shape[1:])
        return by_head.swapaxes(0, 1).reshape(array.shape)

    def from_param(self, param: np.ndarray) -> np.ndarray:
        """The inverse of `to_param`."""
        if self.interleaved > 1:
            by_kind = param.reshape(3, self.interleaved, -1, *param.shape[1:])
            param = by_kind.swapaxes(0, 1).reshape(param.shape)
        return param.T if self.transposed else param


def family_of(config: GPT2Config) -> str:
    """The family that a model of this configuration is written as: one that transformers computes alike, if any.

    Its gpt2 has one key/value head per query head, its gpt_bigcode one in all and no scaling by layer; neither has a
    sliding window or blocks that share keys and values.
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

    GPT-BigCode stores dense weights as [out, in] (Linear), the other families as [in, out] (Conv1D). GPT-BigCode
    without multi-query attention interleaves query, key and value rows.
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
    heads = config.n_head if linear and config.kv_heads == config.n_head else 1
    return BlockParams(
        ln_1=_norm(f"{name}.ln_1", width),
        qkv=_dense(f"{name}.attn.c_attn", qkv_rows, width, linear, heads),
        attn_proj=_dense(f"{name}.attn.c_proj", width, width, linear),
        ln_2=_norm(f"{name}.ln_2", width),
        fc=_dense(f"{name}.mlp.c_fc", inner, width, linear),
        mlp_proj=_dense(f"{name}.mlp.c_proj", width, inner, linear),
    )


def _stored(*arguments: Any, **settings: Any) -> Any:
    return StoredTensor(*arguments, **settings)  # typed Any because the fields of `Params` are declared as arrays


def _norm(name: str, width: int) -> Norm:
    return Norm(weight=_stored(f"{name}.weight", (width,)), bias=_stored(f"{name}.bias", (width,)))


def _dense(name: str, rows: int, columns: int, linear: bool, interleaved: int = 1) -> Dense:
    shape = (rows, columns) if linear else (columns, rows)
    return Dense(
        weight=_stored(f"{name}.weight", shape, transposed=not linear, interleaved=interleaved),
        bias=_stored(f"{name}.bias", (rows,), interleaved=interleaved),
    )
