"""Loading a model for a command."""

import time
from typing import Any

from llorch_jax.cli.terminal import enable_compilation_cache, waiting
from llorch_jax.loading.checkpoint import Model, load


def load_model(source: str, settings: dict[str, Any]) -> tuple[Model, float]:
    """The model, and how many seconds loading took; removes `weights` and `group_size` from the settings."""
    stored = {name: settings.pop(name) for name in ("weights", "group_size") if name in settings}
    enable_compilation_cache()
    start = time.perf_counter()
    with waiting(f"loading {source}") as progress:
        model = load(source, **stored, progress=progress)
    return model, time.perf_counter() - start
