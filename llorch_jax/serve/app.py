"""The HTTP application: routes, limits, authentication, streams."""

import asyncio
import dataclasses
import hmac
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llorch_jax.errors import EngineError, LlorchError
from llorch_jax.serve import jobs, streams
from llorch_jax.serve.answers import Echo, Format, error_body, usage_of
from llorch_jax.serve.bodies import BadRequest, Fields, parse, refusal
from llorch_jax.serve.cache_map import snapshot
from llorch_jax.serve.metrics import Collector, exposition
from llorch_jax.serve.page import PAGE
from llorch_jax.serve.templates import ChatTemplate
from llorch_jax.text.engine import Engine, check_ids
from llorch_jax.text.handles import Handle

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a server.

    Attributes:
        name: name of the model in answers.
        api_key: key that clients must send as a bearer token; None for none.
        max_body: maximum size of a request's body, in bytes.
        max_texts: maximum number of texts per request.
        map_seconds: time between two snapshots of the cache.
    """

    name: str
    api_key: str | None = None
    max_body: int = 1 << 20
    max_texts: int = 64
    map_seconds: float = 0.1


def make_app(engine: Engine, settings: Settings) -> Starlette:
    """The application for an engine, which the caller must close.

    Raises:
        CheckpointError: the model's chat template is damaged.
    """
    server = _Server(engine, settings)
    routes = [
        Route("/", server.page, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.guarded(server.metrics), methods=["GET"]),
        Route("/debug/cache", server.guarded(server.cache), methods=["GET"]),
        Route("/v1/models", server.guarded(server.models), methods=["GET"]),
        Route("/v1/completions", server.guarded(server.completions), methods=["POST"]),
        Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
        Route("/tokenize", server.guarded(server.tokenize), methods=["POST"]),
        Route("/detokenize", server.guarded(server.detokenize), methods=["POST"]),
    ]
    handlers: Any = {
        HTTPException: _http_error,
        BadRequest: _bad_request,
        LlorchError: _refused,
        ClientDisconnect: _gone,
        Exception: _server_error,  # starlette answers with it, and raises the exception again for the log
    }
    return Starlette(routes=routes, exception_handlers=handlers)


class _Server:
    """The handlers of the routes."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._template = ChatTemplate.of(engine.model)
        assert engine.model.tokenizer is not None  # otherwise there would be no engine
        self._tokenizer = engine.model.tokenizer

    def guarded(self, handler: Handler) -> Handler:
        """A handler that requires the API key."""

        async def guard(request: Request) -> Response:
            key = self._settings.api_key
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if key is not None and not hmac.compare_digest(given, key.encode()):
                raise BadRequest("authorization: expected the server's API key as a bearer token", status=401)
            return await handler(request)

        return guard

    async def page(self, request: Request) -> Response:
        """The playground."""
        return HTMLResponse(PAGE)

    async def health(self, request: Request) -> Response:
        """Whether the engine is running."""
        try:
            await run_in_threadpool(self._engine.stats)
        except EngineError as error:
            return JSONResponse({"status": "closed", "message": str(error)}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Statistics for Prometheus."""
        return Response(exposition(await run_in_threadpool(self._engine.inspect, Collector)), media_type=_METRICS)

    async def models(self, request: Request) -> Response:
        """A list of the one model."""
        config = self._engine.model.config
        entry = {"id": self._settings.name, "object": "model", "created": 0, "owned_by": "llorch-jax"}
        return JSONResponse({"object": "list", "data": [{**entry, "max_model_len": config.n_positions}]})

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        job = jobs.completion(self._engine, await self._body(request), self._settings.max_texts)
        return await self._answer(request, job, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answers messages."""
        body = await self._body(request)
        job = await run_in_threadpool(jobs.chat, self._engine, self._template, body, self._settings.max_texts)
        return await self._answer(request, job, chat=True)

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text."""
        fields = Fields(await self._body(request))
        text = fields.text("prompt", None)
        special = fields.flag("add_special_tokens")
        fields.end()
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=special)
        except LlorchError as error:
            raise refusal(error, {"text": "prompt"}) from None
        most = self._engine.model.config.n_positions
        return JSONResponse({"count": len(ids), "max_model_len": most, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        fields = Fields(await self._body(request))
        given = fields.take("tokens")
        fields.end()
        if not isinstance(given, list):
            raise BadRequest(f"tokens: expected a list of token ids, got {given!r:.80}", "tokens")
        try:
            ids = check_ids(given, self._engine.model.config.vocab_size)
            return JSONResponse({"prompt": self._tokenizer.decode(ids)})
        except LlorchError as error:
            raise refusal(error, {"prompt": "tokens"}) from None

    async def cache(self, request: Request) -> Response:
        """Snapshots of the cache's pages, whenever they change."""

        async def events() -> AsyncIterator[bytes]:
            last = None
            while True:
                found = json.dumps(await run_in_threadpool(self._engine.inspect, snapshot))
                if found != last:
                    yield streams.event(found)
                    last = found
                await asyncio.sleep(self._settings.map_seconds)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _body(self, request: Request) -> dict[str, Any]:
        """The body of a request, unless it is too long."""
        most = self._settings.max_body
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise BadRequest(f"body: expected at most {most} bytes, got more", status=413)
        return parse(bytes(body))

    async def _answer(self, request: Request, job: jobs.Job, *, chat: bool) -> Response:
        answer = Format(self._tokenizer, self._settings.name, chat=chat, logprobs=job.logprobs)
        handles = await run_in_threadpool(job.start, self._engine)
        if job.stream:
            events = streams.stream(answer, handles, partial(self._echoes, job, handles), job)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            found = await streams.unless_gone(request, streams.both(partial(self._echoes, job, handles), handles))
        except LlorchError as error:
            raise BadRequest(str(error), status=streams.status_of(error)) from None
        finally:
            streams.cancel(handles)
        if found is None:
            return Response(status_code=499)  # nobody reads it
        echoes, results = found
        return JSONResponse(answer.whole(results, echoes, usage_of(handles, job.samples, silent=job.silent)))

    async def _echoes(self, job: jobs.Job, handles: Sequence[Handle]) -> list[Echo]:
        """What each text of a job begins with. Once the client is gone, or a text has failed, no more is computed."""
        texts = [text for text in job.echoes for _ in range(job.samples)]
        if not job.scored:
            return [Echo(text, None, job.silent) for text in texts]
        gone = threading.Event()

        def wanted() -> bool:
            return not gone.is_set() and not any(handle.failed for handle in handles)

        try:
            scores = await asyncio.to_thread(job.scores, self._engine, wanted)
        finally:
            gone.set()
        for handle in handles:
            if handle.failed:
                await handle.wait()  # raises its error
        return [Echo(text, each, job.silent) for text, each in zip(texts, scores, strict=True)]


async def _bad_request(request: Request, error: BadRequest) -> Response:
    body = error_body(error.message, error.status, error.param)
    return JSONResponse(body, status_code=error.status, headers=dict(error.headers or {}))


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:100]
    message = f"{request.method} {path}: {error.detail}"
    return JSONResponse(error_body(message, error.status_code), status_code=error.status_code, headers=error.headers)


async def _refused(request: Request, error: LlorchError) -> Response:
    return await _bad_request(request, refusal(error))


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _server_error(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body("internal server error; see the server's log", 500), status_code=500)
