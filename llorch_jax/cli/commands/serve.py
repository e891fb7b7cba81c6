"""The command that serves a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llorch_jax.cli.options import ModelArgument, option, with_settings


@with_settings("Model", "Devices")
def serve_command(
    settings: dict[str, Any],
    model: ModelArgument = "demo",
    host: Annotated[
        str, option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all.", panel="Server")
    ] = "127.0.0.1",
    port: Annotated[
        int, option("--port", metavar="N", help="Port to listen on; 0 for any free one.", panel="Server")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="Key that clients must send.",
            envvar="LLORCH_JAX_API_KEY",
            show_envvar=False,
            rich_help_panel="Server",
        ),
    ] = None,
    name: Annotated[
        str | None, option("--name", metavar="NAME", help="Name of the model in responses.", panel="Server")
    ] = None,
    max_body: Annotated[
        int, option("--max-body", metavar="N", help="Maximum bytes per request body.", panel="Server")
    ] = 1 << 20,
    max_texts: Annotated[
        int, option("--max-texts", metavar="N", help="Maximum number of texts per request.", panel="Server")
    ] = 64,
    drain_seconds: Annotated[
        float,
        option(
            "--drain-seconds", metavar="X", help="Seconds for running requests to finish at the end.", panel="Server"
        ),
    ] = 30.0,
    slots: Annotated[
        int, option("--slots", metavar="N", help="Maximum number of requests that run at once.", panel="Engine")
    ] = 8,
    num_pages: Annotated[
        int | None,
        option("--num-pages", metavar="N", help="Pages of the cache; by default a context per slot.", panel="Engine"),
    ] = None,
    page_size: Annotated[int, option("--page-size", metavar="N", help="Tokens per page.", panel="Engine")] = 32,
    codec: Annotated[
        str | None,
        option("--codec", metavar="CODEC", help="Storage format of keys and values, such as int8.", panel="Engine"),
    ] = None,
    chunk: Annotated[
        int, option("--chunk", metavar="N", help="Prompt tokens per step while others decode.", panel="Engine")
    ] = 64,
    max_waiting: Annotated[
        int, option("--max-waiting", metavar="N", help="Maximum number of waiting requests.", panel="Engine")
    ] = 1024,
    offload_bytes: Annotated[
        str,
        option(
            "--offload-bytes",
            metavar="SIZE",
            help="Main memory for cached prefixes that leave the cache, such as 2GB; 0 is off.",
            panel="Engine",
        ),
    ] = "0",
    prefix_cache: Annotated[
        Path | None,
        option("--prefix-cache", metavar="FILE", help="File to keep cached prefixes across restarts.", panel="Engine"),
    ] = None,
    warm_up: Annotated[
        bool, option("--warm-up/--no-warm-up", help="Compile everything before listening.", panel="Engine")
    ] = True,
) -> None:
    """Serve a model over HTTP to many users, with OpenAI's API and a page for trying it out.

    In the options N is a whole number, X any number, and SIZE a number of bytes: 4096, 500MB, 1.5GiB.
    """
    from llorch_jax.cli import serving

    engine = {"slots": slots, "num_pages": num_pages, "page_size": page_size, "codec": codec}
    engine |= {"chunk": chunk, "max_waiting": max_waiting, "offload_bytes": offload_bytes}
    limits = {"name": name, "api_key": api_key, "max_body": max_body, "max_texts": max_texts}
    serving.start(model, settings, engine, limits, host, port, drain_seconds, warm_up, prefix_cache)
