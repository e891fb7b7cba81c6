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
        load: from directory, work directory and number of threads to a function per variant, which continues rows of
            tokens and returns the new ones only.
        precisions: of the weights of each variant. Tokens of float32 ones must be those of every other float32
            implementation.
        packages: whose versions are reported.
        build: how the peer was built, where it can tell.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not come between the answers
    variants: dict[str, Generate] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "load":
                variants = load(request["directory"], request["work"], request["threads"])
                answer = {"variants": precisions, "versions": {p: version(p) for p in packages}, "build": build()}
            else:
                answer = _generate(variants[request["variant"]], request["tokens"], request["new"])
        except Exception as error:  # the reader of the answers decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _generate(generate: Generate, tokens: list[list[int]], new: int) -> dict[str, Any]:
    start = time.perf_counter()
    result = generate(tokens, new)
    return {"tokens": result, "seconds": time.perf_counter() - start}
