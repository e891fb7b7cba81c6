"""llama.cpp through the wheel of xllamacpp, in float32 and Q8_0, one row at a time; converted from the checkpoint here.

Its server runs inside this process. The wheel is compiled for AVX2: a build of llama.cpp for the machine itself may be
faster where much is computed per weight, that is in prefill.
"""

import json
import os
import re
from typing import Any

import gguf
import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType as Stored
from safetensors.numpy import load_file
from worker import Generate, serve

NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def load(directory: str, work: str, threads: int) -> dict[str, Generate]:
    paths = {"f32": f"{work}/f32.gguf", "q8_0": f"{work}/q8_0.gguf"}
    for kind, path in paths.items():
        if not os.path.exists(path):
            _convert(directory, path, Stored[kind.upper()])
    return {kind: _generator(path, threads) for kind, path in paths.items()}


def _generator(path: str, threads: int) -> Generate:
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_parallel = 1024, 1024, 1024, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)
    greedy = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def generate(tokens: list[list[int]], new: int) -> list[list[int]]:
        if len(tokens) > 1:
            raise NotImplementedError("a batch of several rows")
        answer = server.handle_completions({"prompt": tokens[0], "n_predict": new, **greedy})
        if "choices" not in answer:
            raise RuntimeError(json.dumps(answer))
        words = answer["choices"][0]["text"]  # such as t17t4, the words that the comparison's vocabulary has
        return [[int(number) for number in re.findall(r"t(\d+)", words)]]

    return generate


def _convert(directory: str, path: str, kind: Stored) -> None:
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
    _add_vocabulary(writer, words)

    def add_matrix(name: str, array: np.ndarray) -> None:
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)

    writer.add_tensor("position_embd.weight", tensors["wpe.weight"])
    add_matrix("token_embd.weight", tensors["wte.weight"])
    add_matrix("output.weight", tensors.get("lm_head.weight", tensors["wte.weight"]))
    for part in ("weight", "bias"):
        writer.add_tensor(f"output_norm.{part}", tensors[f"ln_f.{part}"])
        for layer in range(config["n_layer"]):
            for name, target in NAMES.items():
                array = np.ascontiguousarray(tensors[f"h.{layer}.{name}.{part}"].T)  # stored as [in, out]
                add = add_matrix if array.ndim == 2 else writer.add_tensor
                add(f"blk.{layer}.{target}.{part}", array)
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


if __name__ == "__main__":
    serve(load, ["f32"], ["xllamacpp"])
