"""Streaming for programs with an event loop."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from llorch_jax.loading.checkpoint import Model
from llorch_jax.text.generation import stream
from llorch_jax.text.results import Piece


async def astream(model: Model, prompt: str, max_new_tokens: int = 64, **options: Any) -> AsyncIterator[Piece]:
    """`stream` as an asynchronous generator: the same pieces, arguments and errors, which come with the first piece.

    The model runs in a separate thread, so that the event loop stays free. Closing the generator, or cancelling the
    task that reads it, stops the work and frees the cache after the running steps, at most twice `streaming.LONGEST`.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="llorch_jax")
    run = partial(asyncio.get_running_loop().run_in_executor, thread)
    try:
        pieces = await run(partial(stream, model, prompt, max_new_tokens, **options))
        try:
            while (piece := await run(next, pieces, None)) is not None:
                yield piece
        finally:
            thread.submit(pieces.close)  # in the same thread, where a cancelled step may still be running
    finally:
        thread.shutdown(wait=False)
