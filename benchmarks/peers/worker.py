"""The peers' side of `benchmarks.compare`: requests as JSON lines on stdin, answers as JSON lines on stdout.

A worker runs in the peer's own Python, so nothing in this folder imports llorch_jax. Requests:

    {"op": "load", "directory": D, "work": W, "threads": N}    D holds a GPT-2 in Hugging Face's layout; W is for files
    {"op": "generate", "variant": V, "tokens": [[...]], "new": N}    greedy, N new tokens per row

Answers: {"variants": {...}, "versions": {...}}, {"tokens": [[...]], "seconds": S}, or {"error": "..."}. Each variant
has the precision of its weights: float32, float16, int8 or int4.
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
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries' output must not get mixed up with the answers
    variants: dict[str, Generate] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "load":
                variants = load(request["directory"], request["work"], request["threads"])
                answer = {"variants": precisions, "versions": {p: version(p) for p in packages}, "build": build()}
            else:
                answer = _generate(variants[request["variant"]], request["tokens"], request["new"])
        except Exception as error:  # the reader of the answers decides what to do about it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _generate(generate: Generate, tokens: list[list[int]], new: int) -> dict[str, Any]:
    start = time.perf_counter()
    result = generate(tokens, new)
    return {"tokens": result, "seconds": time.perf_counter() - start}
