"""Answers on their way: results that are awaited while the client is there, and server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from llorch_jax.errors import EngineError, LlorchError
from llorch_jax.serve.answers import Echo, Format, error_body, usage_of
from llorch_jax.serve.jobs import Job
from llorch_jax.text.handles import Handle
from llorch_jax.text.results import Generation, Piece

Echoes = Callable[[], Coroutine[Any, Any, list[Echo]]]
Result = TypeVar("Result")


async def both(echoes: Echoes, handles: Sequence[Handle]) -> tuple[list[Echo], list[Generation]]:
    """What some texts begin with, and what was generated for them."""
    return await echoes(), [await handle.wait() for handle in handles]


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of some work, or None if the client disconnects, which cancels the work."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(working, watching, return_exceptions=True)


async def stream(answer: Format, handles: Sequence[Handle], echoes_of: Echoes, job: Job) -> AsyncIterator[bytes]:
    """The events of a streamed answer. Whatever ends the stream ends its requests, too."""
    try:
        echoes = await echoes_of()
        places = [answer.places(echo) for echo in echoes]
        for index, echo in enumerate(echoes):
            if echo.text or echo.scores or answer.chat:
                yield event(json.dumps(answer.opening(index, echo, places[index])))
        async for index, piece in _merged(handles):
            if not job.silent:
                yield event(json.dumps(answer.part(index, piece.text, (piece, places[index]))))
        if job.usage:
            yield event(json.dumps(answer.usage_part(usage_of(handles, job.samples, silent=job.silent))))
        yield event("[DONE]")
    except LlorchError as error:
        yield event(json.dumps(error_body(str(error), status_of(error))))
    finally:
        cancel(handles)


async def _merged(handles: Sequence[Handle]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several handles, each with the handle's number, as they arrive."""
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def read(index: int, handle: Handle) -> None:
        try:
            async for piece in handle:
                queue.put_nowait((index, piece))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.ensure_future(read(index, handle)) for index, handle in enumerate(handles)]
    left = len(tasks)
    try:
        while left:
            index, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield index, found
    finally:
        for task in tasks:
            task.cancel()


def cancel(handles: Sequence[Handle]) -> None:
    """Cancels requests; those that have ended stay as they are."""
    for handle in handles:
        handle.cancel()


def event(data: str) -> bytes:
    """A server-sent event."""
    return f"data: {data}\n\n".encode()


def status_of(error: LlorchError) -> int:
    """The HTTP status for a request that failed after it had been queued."""
    if not isinstance(error, EngineError):
        return 400
    return 504 if str(error).startswith("deadline") else 503
