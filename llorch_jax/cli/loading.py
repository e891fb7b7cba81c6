"""Loading a model for a command."""

import time

from llorch_jax.cli.terminal import enable_compilation_cache, waiting
from llorch_jax.loading.checkpoint import Model, load


def load_model(source: str) -> tuple[Model, float]:
    """The model, and how many seconds loading took."""
    enable_compilation_cache()
    start = time.perf_counter()
    with waiting(f"loading {source}") as progress:
        model = load(source, progress=progress)
    return model, time.perf_counter() - start
