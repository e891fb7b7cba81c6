"""llama.cpp through llama-cpp-python, compiled for this machine, in float32, float16, Q8_0, Q4_0 and Q4_K.

Times its own evaluation loop: `llama_decode` and an argmax over the logits in place, without its server and without
copies of the logits. The rows of a batch are sequences of one context. Float32 weights have a float32 KV cache, so that
tokens can be compared; the others have the default, float16.
"""

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from lcpp_files import convert
from worker import Generate, serve

PRECISIONS = {"f32": "float32", "f16": "float16", "q8_0": "int8", "q4_0": "int4", "q4_k": "int4"}
_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Model:
    """A GGUF file and, for each number of rows, a context with its batch."""

    def __init__(self, path: str, exact: bool, threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        self._exact, self._threads = exact, threads
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._length = llama_cpp.llama_model_n_ctx_train(self._model)
        self._contexts: dict[int, tuple[Any, Any]] = {}

    def generate(self, tokens: list[list[int]], new: int) -> list[list[int]]:
        rows = len(tokens)
        if rows not in self._contexts:
            self._contexts[rows] = self._context(rows), llama_cpp.llama_batch_init(rows * self._length, 0, 1)
        context, batch = self._contexts[rows]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        found: list[list[int]] = [[] for _ in tokens]
        given, position = tokens, 0
        while True:
            for row, token in enumerate(self._next(context, batch, given, position)):
                found[row].append(token)
            if len(found[0]) == new:
                return found
            position += len(given[0])
            given = [[row[-1]] for row in found]

    def _context(self, rows: int) -> Any:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * self._length
        settings.n_batch = rows * self._length
        settings.n_ubatch = 512
        settings.n_seq_max = rows
        settings.n_threads = self._threads
        settings.n_threads_batch = self._threads
        settings.kv_unified = rows == 1
        if self._exact:
            settings.type_k = llama_cpp.GGML_TYPE_F32
            settings.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {rows} rows")
        return context

    def _next(self, context: Any, batch: Any, tokens: list[list[int]], position: int) -> list[int]:
        """The most likely token after each row's new tokens, the first of which has this position."""
        count = len(tokens[0])
        total = count * len(tokens)
        batch.n_tokens = total
        _array(batch.token, total)[:] = np.concatenate(tokens)
        _array(batch.pos, total)[:] = np.tile(np.arange(position, position + count), len(tokens))
        _array(batch.n_seq_id, total)[:] = 1
        _array(batch.logits, total)[:] = np.arange(total) % count == count - 1
        for index in range(total):
            batch.seq_id[index][0] = index // count
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode: exit code {code}")
        last = range(count - 1, total, count)
        logits = [llama_cpp.llama_get_logits_ith(context, index) for index in last]
        return [int(_array(each, self._words).argmax()) for each in logits]


def _array(pointer: Any, size: int) -> np.ndarray:
    return np.ctypeslib.as_array(pointer, shape=(size,))


def load(directory: str, work: str, threads: int) -> dict[str, Generate]:
    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    kinds = {kind: convert(directory, work, kind, threads) for kind in PRECISIONS}
    return {kind: Model(path, kind == "f32", threads).generate for kind, path in kinds.items()}


def build() -> str:
    """The instructions that llama.cpp was compiled for."""
    return llama_cpp.llama_print_system_info().decode()


if __name__ == "__main__":
    serve(load, PRECISIONS, ["llama-cpp-python"], build)
