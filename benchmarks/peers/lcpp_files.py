"""GPT-2 checkpoints as GGUF files: float32 by the gguf package, other formats by llama.cpp's own quantizer."""

import ctypes
import json
import os
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
FORMATS = {
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def convert(directory: str, work: str, kind: str, threads: int) -> str:
    """The path of the checkpoint as a GGUF file in "f32" or one of `FORMATS`; the file is written if it is missing."""
    path = f"{work}/{kind}.gguf"
    if os.path.exists(path):
        return path
    if kind == "f32":
        _write_float32(directory, path)
        return path
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FORMATS[kind]
    settings.nthread = threads
    source = convert(directory, work, "f32", threads)
    code = llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(settings))
    if code:
        raise RuntimeError(f"llama_model_quantize: exit code {code} for {kind}")
    return path


def _write_float32(directory: str, path: str) -> None:
    with open(f"{directory}/config.json") as file:
        config = json.load(file)
    with open(f"{directory}/vocab.json") as file:
        words = json.load(file)
    stored = load_file(f"{directory}/model.safetensors").items()
    tensors = {name.removeprefix("transformer."): array.astype(np.float32) for name, array in stored}
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_ALL_F32)
    _add_vocabulary(writer, words)
    writer.add_tensor("position_embd.weight", tensors["wpe.weight"])
    writer.add_tensor("token_embd.weight", tensors["wte.weight"])
    writer.add_tensor("output.weight", tensors.get("lm_head.weight", tensors["wte.weight"]))
    for part in ("weight", "bias"):
        writer.add_tensor(f"output_norm.{part}", tensors[f"ln_f.{part}"])
        for layer in range(config["n_layer"]):
            for name, target in NAMES.items():
                array = np.ascontiguousarray(tensors[f"h.{layer}.{name}.{part}"].T)  # stored as [in, out]
                writer.add_tensor(f"blk.{layer}.{target}.{part}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, words: dict[str, int]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(words, key=words.__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(len(words) - 1)
    writer.add_eos_token_id(len(words) - 1)
