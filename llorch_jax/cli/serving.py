"""`llorch-jax serve`."""

from pathlib import Path
from typing import Any

from llorch_jax.cli import interrupts
from llorch_jax.cli.loading import load_model
from llorch_jax.cli.terminal import note, read_bytes, waiting
from llorch_jax.errors import EngineError
from llorch_jax.files import exists
from llorch_jax.text.engine import Engine
from llorch_jax.tracing import whole


def start(
    source: str,
    settings: dict[str, Any],
    engine: dict[str, Any],
    limits: dict[str, Any],
    host: str,
    port: int,
    drain_seconds: float,
    warm_up: bool,
    prefixes: Path | None,
) -> None:
    """Serves a model until the process is told to stop.

    Raises:
        EngineError: a setting is invalid, the address is taken, or the extra `serve` is missing.
    """
    try:
        from llorch_jax.serve.app import Settings
        from llorch_jax.serve.run import serve
    except ImportError as error:
        raise EngineError(
            f"serve: expected the extra `serve`, got no {error.name}; install it with pip install 'llorch-jax[serve]'"
        ) from None
    whole("port", port, EngineError, least=0, most=65535)
    for name in ("max_body", "max_texts"):
        whole(name, limits[name], EngineError)
    if limits["api_key"] == "":
        raise EngineError("api_key: expected a key that is not empty")
    if not 0 < drain_seconds < 1e6:
        raise EngineError(f"drain_seconds: expected seconds above 0, got {drain_seconds}")
    engine |= {"offload_bytes": read_bytes("offload_bytes", engine["offload_bytes"])}
    saved = prefixes is not None and exists(prefixes, EngineError)
    model, _ = load_model(source, settings)
    running = Engine(model, **engine)
    if prefixes is not None and saved:
        _load_prefixes(running, prefixes)
    if warm_up:
        with waiting("compiling"):
            running.warm_up()
    interrupts.give_back()
    serve(running, Settings(**{**limits, "name": limits["name"] or model.name}), host, port, drain_seconds, prefixes)


def _load_prefixes(engine: Engine, path: Path) -> None:
    try:
        count = engine.load_prefixes(path)
    except BaseException:
        engine.close(drain=False)
        raise
    note(f"loaded {count} {'page' if count == 1 else 'pages'} of cached prefixes from {path}", style="")
