"""GPT2Config: the hyperparameters of a GPT-2 (or GPT-BigCode) model, hashable and therefore usable as jit-static."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llorch_jax.errors import ConfigError

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh", "quick_gelu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Hyperparameters under Hugging Face's field names; the defaults are GPT-2 small's, without special ids.

    Attributes:
        vocab_size: number of token ids V.
        n_positions: longest context; there is one learned position embedding per position.
        n_embd: width D of the residual stream.
        n_layer: number of blocks L.
        n_head: number of query heads N; must divide `n_embd`.
        num_kv_heads: key/value heads K; None means `n_head` (multi-head), 1 is multi-query, in between grouped-query.
        n_inner: width of the feed-forward layer; None means 4 * `n_embd`.
        activation_function: one of `ACTIVATIONS`.
        layer_norm_epsilon: added to the variance in layer norms.
        scale_attn_weights: divide attention scores by sqrt(head_dim).
        scale_attn_by_inverse_layer_idx: divide the scores of layer i by i + 1 as well.
        reorder_and_upcast_attn: compute scores in float32; has no effect, as scores are always float32 here.
        tie_word_embeddings: the output projection is the token embedding.
        sliding_window: number of newest tokens attended to, including the current one; None attends to all.
        kv_sharing: for each block the block whose keys and values it attends to, itself or an earlier one; None means
            that no block shares them (cross-layer attention, Brandon et al. 2024, 2405.12981).
        bos_token_id: id that begins a text, or None.
        eos_token_id: id that ends a text, a tuple of several such ids, or None. `eos_ids` has them as a tuple.

    Raises:
        ConfigError: a value is invalid or contradicts another; the message names the field.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    num_kv_heads: int | None = None
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    kv_sharing: tuple[int, ...] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            _require_count(name, getattr(self, name))
        for name in ("num_kv_heads", "n_inner", "sliding_window"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false, got {getattr(self, name)!r:.80}")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_head: expected a divisor of n_embd={self.n_embd}, got {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ConfigError(f"num_kv_heads: expected a divisor of n_head={self.n_head}, got {self.num_kv_heads}")
        if self.activation_function not in ACTIVATIONS:
            expected = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation_function: expected one of {expected}; got {self.activation_function!r:.80}")
        epsilon = self.layer_norm_epsilon
        if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
            raise ConfigError(f"layer_norm_epsilon: expected a number between 0 and 1, got {epsilon!r:.80}")
        self._check_sharing()
        self._check_special_ids()

    def _check_special_ids(self) -> None:
        expected = f"null or an id below vocab_size={self.vocab_size}"
        if self.bos_token_id is not None and not self._is_token_id(self.bos_token_id):
            raise ConfigError(f"bos_token_id: expected {expected}, got {self.bos_token_id!r:.80}")
        eos = self.eos_token_id
        several = isinstance(eos, tuple) and len(eos) > 0
        if (eos is not None and not (several or type(eos) is int)) or not all(map(self._is_token_id, self.eos_ids)):
            raise ConfigError(f"eos_token_id: expected {expected}, or a tuple of such ids, got {eos!r:.80}")

    def _is_token_id(self, value: Any) -> bool:
        return type(value) is int and 0 <= value < self.vocab_size

    def _check_sharing(self) -> None:
        if self.kv_sharing is None:
            return
        if not isinstance(self.kv_sharing, tuple) or len(self.kv_sharing) != self.n_layer:
            expected = f"a tuple of n_layer={self.n_layer} blocks"
            raise ConfigError(f"kv_sharing: expected {expected}, got {self.kv_sharing!r:.80}")
        for block, source in enumerate(self.kv_sharing):
            if type(source) is not int or not 0 <= source <= block or self.kv_sharing[source] != source:
                raise ConfigError(
                    f"kv_sharing[{block}]: expected {block} or an earlier block that has keys and values of its own, "
                    f"got {source!r:.80}"
                )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text; empty if there are none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def cache_layers(self) -> int:
        """Number of blocks that compute keys and values."""
        return self.n_layer if self.kv_sharing is None else len(set(self.kv_sharing))

    def cache_layer(self, block: int) -> int:
        """The cache layer, 0 .. cache_layers - 1, that a block attends to."""
        return block if self.kv_sharing is None else sorted(set(self.kv_sharing)).index(self.kv_sharing[block])

    def owns_cache_layer(self, block: int) -> bool:
        """Whether a block computes keys and values."""
        return self.kv_sharing is None or self.kv_sharing[block] == block

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads K."""
        return self.n_head if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width H of one head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, layer: int) -> float:
        """The factor of the attention scores of `layer`."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def from_hf_dict(cls, fields: Mapping[str, Any]) -> "GPT2Config":
        """The configuration that a Hugging Face `config.json` of a gpt2 or gpt_bigcode model describes.

        Spellings are those that transformers accepts: `hidden_size`, `max_position_embeddings`, `num_attention_heads`
        and `num_hidden_layers` for `n_embd`, `n_positions`, `n_head` and `n_layer`; `swish` for `silu` and the other
        names of the same activations; a list of ids for `eos_token_id`. `n_ctx` is used only if `n_positions` is
        missing. As in transformers, the special ids default to GPT-2's 50256. An id outside the vocabulary, which no
        model can read or generate, is ignored.

        Args:
            fields: the parsed JSON. Training-only and bookkeeping fields (dropout, initializer_range, ...) are ignored.

        Raises:
            ConfigError: a field is unknown, requires something unsupported, or contradicts another.
        """
        if not isinstance(fields, Mapping):
            raise ConfigError(f"fields: expected a mapping of names to values, got {fields!r:.80}")
        return cls(**_translate(dict(fields)))

    @classmethod
    def from_preset(cls, name: str) -> "GPT2Config":
        """A configuration by name: gpt2, gpt2-medium, gpt2-large, gpt2-xl or distilgpt2.

        Raises:
            ConfigError: there is no preset of that name.
        """
        presets = {path.stem: path for path in _preset_folder().glob("*.toml")}
        if name not in presets:
            raise ConfigError(f"preset: expected one of {', '.join(sorted(presets))}; got {name!r:.80}")
        return cls.from_hf_dict(tomllib.loads(presets[name].read_text())["model"])


_BOOLEANS = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id")
_END_OF_TEXT = 50256  # transformers' default for both
_MODEL_TYPES = ("gpt2", "gpt_bigcode", "llorch_gpt2")
_OWN_FIELDS = frozenset(field.name for field in dataclasses.fields(GPT2Config))
_ALIASES = {  # the attribute_map of transformers' configurations
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_SAME_ACTIVATION = {  # transformers' other names of the same functions
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}

# Fields of transformers' configurations that do not affect inference in float32. Names that begin with an
# underscore (bookkeeping) or end in _token_id (the other special ids) are ignored as well.
_IGNORED = frozenset(
    """
    architectures attention_softmax_in_fp32 attn_implementation attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward classifier_dropout diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty finetuning_task gradient_checkpointing hidden_dropout id2label inference_runner
    initializer_range is_decoder is_encoder_decoder label2id length_penalty loss_type max_batch_size max_length
    max_new_tokens max_sequence_length min_length n_ctx n_special name_or_path no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_past output_scores
    pad_key_length predict_special_tokens prefix problem_type remove_invalid_values renormalize_logits
    repetition_penalty resid_pdrop return_dict return_dict_in_generate scale_attention_softmax_in_fp32
    summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    validate_runner_input
    """.split()  # noqa: SIM905 (a list of 80 strings would take a screen)
)
_UNSUPPORTED = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "per_layer_config": None,
    "quantization_config": None,
}


def _translate(fields: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments from Hugging Face fields."""
    family = fields.pop("model_type", "gpt2")
    if family not in _MODEL_TYPES:
        raise ConfigError(f"model_type: expected one of {', '.join(_MODEL_TYPES)}; got {family!r:.80}")
    for name, only in _UNSUPPORTED.items():
        if fields.pop(name, only) != only:
            raise ConfigError(f"{name}: not supported; expected it to be absent or {only!r}")
    if fields.pop("pruned_heads", None):
        raise ConfigError("pruned_heads: not supported; expected it to be absent or empty")
    for alias, name in _ALIASES.items():
        _merge(fields, name, fields.pop(alias, None), alias)
    if fields.get("n_positions") is None and fields.get("n_ctx") is not None:
        fields["n_positions"] = fields["n_ctx"]
    _translate_attention(fields, family)
    _translate_activation(fields, family)
    _translate_special_ids(fields)
    if isinstance(fields.get("kv_sharing"), list):
        fields["kv_sharing"] = tuple(fields["kv_sharing"])
    unknown = sorted(name for name in fields.keys() - _OWN_FIELDS - _IGNORED if not _is_bookkeeping(name))
    if unknown:
        raise ConfigError(f"{unknown[0]:.80}: unknown setting; known are {', '.join(sorted(_OWN_FIELDS))}")
    return {name: value for name, value in fields.items() if name in _OWN_FIELDS}


def _is_bookkeeping(name: str) -> bool:
    return name.startswith("_") or name.endswith("_token_id")


def _translate_attention(fields: dict[str, Any], family: str) -> None:
    """Sets `num_kv_heads` from the fields that each family uses for it."""
    if "multi_query" in fields or family == "gpt_bigcode":
        multi_query = fields.pop("multi_query", True)
        if not isinstance(multi_query, bool):
            raise ConfigError(f"multi_query: expected true or false, got {multi_query!r:.80}")
        heads = 1 if multi_query else fields.get("n_head", GPT2Config.n_head)
        _merge(fields, "num_kv_heads", heads, "multi_query")
    _merge(fields, "num_kv_heads", fields.pop("num_key_value_heads", None), "num_key_value_heads")


def _translate_activation(fields: dict[str, Any], family: str) -> None:
    """Sets `activation_function` to its name in `ACTIVATIONS`."""
    if family == "gpt_bigcode":
        fields.setdefault("activation_function", "gelu_pytorch_tanh")
    name = fields.get("activation_function")
    if isinstance(name, str):
        fields["activation_function"] = _SAME_ACTIVATION.get(name, name)


def _translate_special_ids(fields: dict[str, Any]) -> None:
    """Sets the special ids: transformers' defaults, lists as tuples, without ids outside the vocabulary."""
    vocab_size = fields.get("vocab_size", GPT2Config.vocab_size)
    if type(vocab_size) is not int:
        return  # the constructor reports the error
    for name in _SPECIAL_IDS:
        value = fields.get(name, _END_OF_TEXT)
        if type(value) is int:
            fields[name] = value if 0 <= value < vocab_size else None
        elif isinstance(value, list) and all(type(id) is int for id in value) and name == "eos_token_id":
            inside = tuple(dict.fromkeys(id for id in value if 0 <= id < vocab_size))
            fields[name] = inside if len(inside) > 1 else next(iter(inside), None)


def _merge(fields: dict[str, Any], name: str, value: Any, source: str) -> None:
    """Sets `fields[name]` from an alias; if both are given, they must agree."""
    if value is None:
        return
    if fields.get(name) is not None and fields[name] != value:
        raise ConfigError(f"{source}: contradicts {name}={fields[name]!r:.80}, got {value!r:.80}")
    fields[name] = value


def _require_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name}: expected a positive integer, got {value!r:.80}")


def _preset_folder() -> Path:
    """`configs/`, next to the package in a checkout and inside it in an installed wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
