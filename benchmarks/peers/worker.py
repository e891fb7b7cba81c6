"""The peers' side of our benchmarks: requests as JSON lines on stdin, answers as JSON lines on stdout.

A worker runs in the peer's own Python, so nothing in this folder imports llorch_jax. Requests of `benchmarks.compare`:

    {"op": "load", "directory": D, "work": W, "threads": N}    D holds a GPT-2 in Hugging Face's layout; W is for files
    {"op": "generate", "variant": V, "tokens": [[...]], "new": N}    greedy, N new tokens per row

Answers: {"variants": {...}, "versions": {...}}, {"tokens": [[...]], "seconds": S}, or {"error": "..."}. Each variant
has the precision of its weights: float32, float16, int8 or int4. `lcpp_server.py` has a request of its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]


def serve(
    load: Callable[[str, str, int], dict[str, Generate]],
    precisions: dict[str, str],
    packages: list[str],
    build: Callable[[], str] = lambda: "",
) -> None:
    """Answers requests until stdin ends.

    Args:
        load: takes the directory, the work directory and the number of threads; returns, for each variant, a function
            that continues rows of tokens and returns only the new ones.
        precisions: the precision of each variant's weights. Float32 variants must generate the same tokens as every
            other float32 implementation.
        packages: packages whose versions are reported.
        build: tells how the peer was built, if it can.
    """
    variants: dict[str, Generate] = {}

    def load_all(directory: str, work: str, threads: int) -> dict[str, Any]:
        variants.update(load(directory, work, threads))
        return {"variants": precisions, "versions": {each: version(each) for each in packages}, "build": build()}

    def generate(variant: str, tokens: list[list[int]], new: int) -> dict[str, Any]:
        start = time.perf_counter()
        result = variants[variant](tokens, new)
        return {"tokens": result, "seconds": time.perf_counter() - start}

    answer_requests({"load": load_all, "generate": generate})


def answer_requests(operations: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests until stdin ends, each by the function with the name of its "op", which gets all other keys."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries' output must not get mixed up with the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop("op")](**request)
        except Exception as error:  # the reader of the answers decides what to do about it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
