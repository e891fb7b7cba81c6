"""llama.cpp through llama-cpp-python, in float32 and Q8_0, one row at a time; converted from the checkpoint here."""

import json
import os
from typing import Any

import gguf
import llama_cpp
import numpy as np
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
    exact, rounded = f"{work}/f32.gguf", f"{work}/q8_0.gguf"
    if not os.path.exists(exact):
        _convert(directory, exact)
    if not os.path.exists(rounded):
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, threads
        llama_cpp.llama_model_quantize(exact.encode(), rounded.encode(), settings)
    return {"f32": _generator(exact, threads), "q8_0": _generator(rounded, threads)}


def _generator(path: str, threads: int) -> Generate:
    float32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        path,
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=1024,
        type_k=float32,
        type_v=float32,
        verbose=False,
    )

    def generate(tokens: list[list[int]], new: int) -> list[list[int]]:
        if len(tokens) > 1:
            raise NotImplementedError("a batch of several rows")
        model.reset()
        model.eval(tokens[0])
        chosen = [_argmax(model)]
        while len(chosen) < new:
            model.eval(chosen[-1:])
            chosen.append(_argmax(model))
        return [chosen]

    return generate


def _argmax(model: Any) -> int:
    """The likeliest token: by NumPy over llama.cpp's logits, which is faster than its sampler through Python."""
    pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(pointer, (model.n_vocab(),)).argmax())


def _convert(directory: str, path: str) -> None:
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
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer, words)
    for name, target in {"wte": "token_embd", "wpe": "position_embd"}.items():
        writer.add_tensor(f"{target}.weight", tensors[f"{name}.weight"])
    writer.add_tensor("output.weight", tensors.get("lm_head.weight", tensors["wte.weight"]))
    for kind in ("weight", "bias"):
        writer.add_tensor(f"output_norm.{kind}", tensors[f"ln_f.{kind}"])
        for layer in range(config["n_layer"]):
            for name, target in NAMES.items():
                array = np.ascontiguousarray(tensors[f"h.{layer}.{name}.{kind}"].T)  # stored as [in, out]
                writer.add_tensor(f"blk.{layer}.{target}.{kind}", array)
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
    serve(load, ["f32"], ["llama-cpp-python"])
