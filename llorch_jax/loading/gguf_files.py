"""GGUF files of GPT-2 and StarCoder models: llama.cpp's format, parsed by the `gguf` package (extra `gguf`).

Arrays are kept as they are stored. Blocks of Q8_0 are int8 codes in groups of 32 and blocks of Q4_0 int4 codes, bit for
bit: see `llorch_jax/linear.py`. Dense weights are output-major in these files, too; only the rows of queries, keys and
values are reordered, by key/value head.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llorch_jax import files
from llorch_jax.config import GPT2Config
from llorch_jax.errors import CheckpointError, ConfigError, QuantizationError
from llorch_jax.linear import Dense, Matrix, Norm, QuantizedMatrix
from llorch_jax.loading.hf_format import grouped_heads
from llorch_jax.loading.safetensors_files import cast, counted
from llorch_jax.params import BlockParams, Params
from llorch_jax.quantization import DTYPES, WeightFormat, quantize

SUFFIX = ".gguf"
_GROUP = 32  # elements per block of Q8_0 and Q4_0
_ARCHITECTURES = ("gpt2", "starcoder")
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_AGAIN = "copy or download it again"
Progress = Callable[[int, int], Any]


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An open file.

    Attributes:
        path: path of the file.
        fields: metadata by name.
        tensors: tensors by name, as the `gguf` package describes them.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "GGUF":
        """Maps a file into memory and reads its metadata.

        Raises:
            CheckpointError: the extra `gguf` is missing, or the file is damaged or not a GGUF file.
        """
        try:
            import gguf
        except ImportError:
            raise CheckpointError(
                f"{path}: expected the extra `gguf` to read it; install it with pip install 'llorch-jax[gguf]'"
            ) from None
        files.check_regular(path, CheckpointError, _AGAIN)
        try:
            reader = gguf.GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # it checks little, so errors can be of any type
            reason = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{path}: expected a whole GGUF file, got none ({reason}); {_AGAIN}") from None
        if reader.byte_order == "S":
            raise CheckpointError(f"{path}: expected a file in this machine's byte order, got one in the other order")
        return cls(path, fields, {tensor.name: tensor for tensor in reader.tensors})

    def field(self, name: str, kind: type, default: Any = None) -> Any:
        """A field of the metadata; "ARCH" in its name stands for the architecture.

        Raises:
            CheckpointError: it is missing or has another type.
        """
        name = name.replace("ARCH", self.architecture)
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise CheckpointError(f"{self.path}: {name}: expected a {kind.__name__}, got {value!r:.60}")
        return value

    @property
    def architecture(self) -> str:
        """The architecture, after a check that it is supported."""
        found = self.fields.get("general.architecture")
        if found not in _ARCHITECTURES:
            raise ConfigError(
                f"{self.path}: general.architecture: expected one of {', '.join(_ARCHITECTURES)}; got {found!r:.60}"
            )
        return found

    def config(self) -> GPT2Config:
        """The hyperparameters.

        Raises:
            CheckpointError: a hyperparameter is missing.
            ConfigError: they describe an unsupported model.
        """
        heads = self.field("ARCH.attention.head_count", int)
        embedding = self._tensor("token_embd.weight")
        vocab_size = int(embedding.shape[1])
        width, inner = (self.field(f"ARCH.{name}", int) for name in ("embedding_length", "feed_forward_length"))
        # Stored in float32: the number that was meant is the shortest decimal that rounds to it.
        epsilon = float(str(np.float32(self.field("ARCH.attention.layer_norm_epsilon", float))))
        ids: dict[str, Any] = {}
        for name in ("bos_token_id", "eos_token_id"):
            id = self.fields.get(f"tokenizer.ggml.{name}")
            if isinstance(id, int) and id < vocab_size:
                ids[name] = id
        try:
            return GPT2Config(
                vocab_size=vocab_size,
                n_positions=self.field("ARCH.context_length", int),
                n_embd=width,
                n_layer=self.field("ARCH.block_count", int),
                n_head=heads,
                num_kv_heads=self.field("ARCH.attention.head_count_kv", int, heads),
                n_inner=None if inner == 4 * width else inner,
                layer_norm_epsilon=epsilon,
                activation_function="gelu_pytorch_tanh",
                tie_word_embeddings=self._tied(),
                **ids,
            )
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def describe(self) -> str:
        """A text that lists the types of the tensors and their sizes."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
        return ", ".join(
            f"{size / 1e6:,.1f} MB {kind}" for kind, size in sorted(sizes.items(), key=lambda each: -each[1])
        )

    def params(self, config: GPT2Config, progress: Progress | None = None) -> Params:
        """The weights as they are stored.

        Raises:
            CheckpointError: a tensor is missing, unexpected, misshapen, not finite, or of an unsupported type.
        """
        if config.n_layer > len(self.tensors):
            raise CheckpointError(
                f"{self.path}: expected the tensors of {config.n_layer} blocks, got {counted(len(self.tensors))}"
            )
        total = sum(int(tensor.n_bytes) for tensor in self.tensors.values())
        done, used = 0, {"output.weight"} if config.tie_word_embeddings else set()

        def read(name: str, *shape: int, heads: tuple[int, ...] = (), wide: bool = False) -> Any:
            nonlocal done
            matrix = self._read(name, shape, heads, wide)
            used.add(name)
            done += int(self.tensors[name].n_bytes)
            if progress is not None:
                progress(done, total)
            return matrix

        def norm(name: str) -> Norm:
            return Norm(read(f"{name}.weight", width, wide=True), read(f"{name}.bias", width, wide=True))

        def dense(name: str, rows: int, columns: int, heads: tuple[int, ...] = ()) -> Dense:
            weight = read(f"{name}.weight", rows, columns, heads=heads)
            return Dense(weight, read(f"{name}.bias", rows, heads=heads, wide=True))

        width, inner = config.n_embd, config.inner_dim
        qkv_rows = (config.n_head + 2 * config.kv_heads) * config.head_dim
        order = grouped_heads(config)
        wte = read("token_embd.weight", config.vocab_size, width)
        blocks = tuple(
            BlockParams(
                ln_1=norm(f"blk.{layer}.attn_norm"),
                qkv=dense(f"blk.{layer}.attn_qkv", qkv_rows, width, order),
                attn_proj=dense(f"blk.{layer}.attn_output", width, width),
                ln_2=norm(f"blk.{layer}.ffn_norm"),
                fc=dense(f"blk.{layer}.ffn_up", inner, width),
                mlp_proj=dense(f"blk.{layer}.ffn_down", width, inner),
            )
            for layer in range(config.n_layer)
        )
        params = Params(
            wte=wte,
            wpe=read("position_embd.weight", config.n_positions, width, wide=True),
            blocks=blocks,
            ln_f=norm("output_norm"),
            lm_head=None if config.tie_word_embeddings else read("output.weight", config.vocab_size, width),
        )
        surplus = self.tensors.keys() - used
        if surplus:
            raise CheckpointError(
                f"{self.path}: {sorted(surplus)[0]}: expected no such tensor in a {self.architecture}"
            )
        return params

    def _tied(self) -> bool:
        """Whether the output projection equals the embedding, which some converters write twice."""
        output, embedding = self.tensors.get("output.weight"), self._tensor("token_embd.weight")
        if output is None:
            return True
        return output.tensor_type == embedding.tensor_type and np.array_equal(
            _bytes(output.data), _bytes(embedding.data)
        )

    def _tensor(self, name: str) -> Any:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: {name}: expected this tensor in a {self.architecture}, found none")
        return self.tensors[name]

    def _read(self, name: str, shape: tuple[int, ...], heads: tuple[int, ...], wide: bool) -> Matrix:
        """A tensor, with its rows in the order of heads; `wide` converts it to float32, which is exact."""
        tensor = self._tensor(name)
        where = f"{self.path}: {name}"
        kind = tensor.tensor_type.name
        found = tuple(int(size) for size in reversed(tensor.shape))
        if kind not in _TYPES:
            raise CheckpointError(
                f"{where}: expected one of {', '.join(_TYPES)}; got {kind}; convert it to one of them"
            )
        if found != shape:
            raise CheckpointError(f"{where}: expected shape {list(shape)}, as the metadata says, got {list(found)}")
        if kind in ("Q8_0", "Q4_0"):
            matrix = _quantized(np.asarray(tensor.data), 8 if kind == "Q8_0" else 4, heads, where)
            return matrix.dequantize() if wide else matrix
        dtype = DTYPES[{"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]]
        array = _ordered(_bytes(tensor.data).view(dtype).reshape(shape), heads)
        return jax.device_put(cast(array, DTYPES["float32"] if wide else dtype, where)).block_until_ready()


def load_gguf(
    path: Path, weights: Any, group_size: int | None, progress: Progress | None
) -> tuple[GGUF, GPT2Config, Params]:
    """The file, its configuration, and its weights in the given format, or as they are stored.

    Raises:
        CheckpointError: the file is damaged or contains something else.
        ConfigError: the model is not supported.
        QuantizationError: the weights would be rounded a second time.
    """
    file = GGUF.open(path)
    config = file.config()
    params = file.params(config, progress)
    if weights is None and group_size is None:
        return file, config, params
    form = WeightFormat.of("float32" if weights is None else weights, group_size)
    floats = jax.tree.map(_widened, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    if form.name != "float32" and floats is not params and _is_quantized(params):
        raise QuantizationError(
            f"weights: expected float32, or none to keep the file's format, got {form.name}; {path.name} is quantized "
            "already"
        )
    return file, config, floats if form.name == "float32" else quantize(floats, *form)


def _quantized(data: np.ndarray, bits: int, heads: tuple[int, ...], where: str) -> QuantizedMatrix:
    """The codes and scales in blocks uint8 [out, bytes]."""
    blocks = data.reshape(data.shape[0], -1, 2 + _GROUP * bits // 8)
    scales = _ordered(np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0], heads)
    codes = _ordered(np.ascontiguousarray(blocks[:, :, 2:]).reshape(data.shape[0], -1), heads)
    if bits == 8:
        codes = codes.view(np.int8)
        if codes.min(initial=0) == -128:
            raise CheckpointError(f"{where}: expected codes in -127 .. 127, as Q8_0 has them, got -128")
    scales = cast(scales, scales.dtype, where)
    on_device = [jax.device_put(each).block_until_ready() for each in (codes, scales)]
    return QuantizedMatrix(on_device[0], on_device[1], bits, _GROUP)


def _ordered(array: np.ndarray, heads: tuple[int, ...]) -> np.ndarray:
    """A copy of the rows out of the mapped file, in the order of heads, which have equal numbers of rows."""
    if not heads:
        return np.array(array)
    return array.reshape(len(heads), -1, *array.shape[1:])[list(heads)].reshape(array.shape)


def _widened(leaf: Any) -> Any:
    return leaf.dequantize() if isinstance(leaf, QuantizedMatrix) else leaf.astype(np.float32)


def _is_quantized(params: Params) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix))
    return any(isinstance(leaf, QuantizedMatrix) for leaf in leaves)


def _bytes(data: Any) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
