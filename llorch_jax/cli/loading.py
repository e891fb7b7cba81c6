"""Loading a model for a command."""

import time
from typing import Any

from llorch_jax.cli.devices import take_mesh
from llorch_jax.cli.terminal import enable_compilation_cache, waiting
from llorch_jax.loading.checkpoint import Model, load


def load_model(source: str, settings: dict[str, Any]) -> tuple[Model, float]:
    """The model, on a mesh if one was asked for, and the seconds that loading took.

    Removes `weights`, `group_size`, `mesh` and what describes processes from the settings.
    """
    stored = {name: settings.pop(name) for name in ("weights", "group_size") if name in settings}
    enable_compilation_cache()
    mesh = take_mesh(settings)
    start = time.perf_counter()
    with waiting(f"loading {source}") as progress:
        model = load(source, **stored, progress=progress, mesh=mesh)
    return model, time.perf_counter() - start
