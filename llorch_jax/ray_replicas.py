"""What runs on the nodes: doors, which take requests, and replicas, each with an engine, that answer them.

Ray Serve's HTTP proxy chooses a replica by a request's headers alone: the body comes later, straight to the replica. So
the choice by prompts is made behind it. A door reads the body, and passes the request on by a deployment handle, whose
router sees what the door has made of the prompt. The replica gives the request to the server's ASGI application, and
yields the messages of the answer as they come.
"""

import asyncio
import contextlib
import hashlib
import json
import math
from collections.abc import AsyncIterator, MutableMapping
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llorch_jax.cores import limit_threads
from llorch_jax.serve.answers import error_body
from llorch_jax.serve.app import Settings, make_app
from llorch_jax.text.engine import Engine

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from llorch_jax.ray import Source

SESSION = "x-session-id"  # the header by which Ray Serve, too, knows sessions
REPLICA = "x-replica"  # the header that says who has answered
_SHARE = 1.25  # times the mean number of requests under way that a replica has at most
_ATTEMPTS = 3  # for a request whose replicas die: it may be what kills them
_OPEN = 10_000  # requests that a door has under way
_SCOPE = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
)

Message = MutableMapping[str, Any]


class PrefixRouter(ConsistentHashRouter):
    """Gives requests that begin alike to the same replica, by consistent hashing with bounded loads.

    Ray's router puts replicas on a ring, and a request on the place to which its session's id is hashed; here that id
    stands for the beginning of the prompt. From there on, the first replica that has less than `_SHARE` times the mean
    number of requests under way is asked first (https://arxiv.org/abs/1608.01350), so that popular prompts spread over
    as many replicas as they need. Where a replica is added or dies, only its own part of the ring moves. A request
    without a beginning goes where there are the fewest requests.
    """

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        """Lists of one replica each, in the order in which they are asked."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if any(len(rank) != 1 for rank in ranks):
            return ranks  # there is no request
        under_way = [self.replica_queue_len_cache.get(rank[0].replica_id) or 0 for rank in ranks]
        most = math.ceil(_SHARE * (sum(under_way) + 1) / max(len(ranks), 1))
        if pending_request.metadata.session_id:
            order = sorted(range(len(ranks)), key=lambda n: under_way[n] >= most)
        else:
            order = sorted(range(len(ranks)), key=lambda n: under_way[n])
        return [ranks[n] for n in order]


class Replica:
    """A model, its engine, and the server's application."""

    def __init__(
        self, source: "Source", settings: Settings, engine: dict[str, Any], threads: int, warm_up: bool
    ) -> None:
        limit_threads(threads)
        model = source.load()
        self._engine = Engine(model, **engine)
        if warm_up:
            self._engine.warm_up()
        name = settings.name or model.name
        self._app = make_app(self._engine, Settings(name, settings.api_key, settings.max_body, settings.max_texts))
        self._id = serve.get_replica_context().replica_id.unique_id.encode()

    async def __call__(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """The messages of the answer to a request, which ends when nobody waits for them any more."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not parts:
                await asyncio.Event().wait()  # a client that goes ends the task
            return parts.pop()

        async def answer() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        answering = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA.encode(), self._id)]
                yield message
            await answering  # raises what went wrong, for Ray's log
        finally:
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await answering

    async def check_health(self) -> None:
        """Raises an error if the engine has ended: then Ray replaces the replica."""
        await asyncio.to_thread(self._engine.stats)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close(drain=False)


class Door:
    """Takes requests, and passes them on."""

    def __init__(self, replicas: "DeploymentHandle[Any]", max_body: int, prefix_chars: int) -> None:
        self._replicas = replicas.options(stream=True)
        self._max_body = max_body
        self._prefix_chars = prefix_chars

    async def __call__(self, request: Request) -> Response:
        """The answer of the replica that gets the request."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body:
                break  # enough for the replica to refuse it
        session = request.headers.get(SESSION) or session_of(bytes(body), self._prefix_chars)
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        return _Relayed(self._replicas.options(session_id=session), scope, bytes(body))


class _Relayed(Response):
    """An answer that comes from a replica, message by message."""

    def __init__(self, replicas: "DeploymentHandle[Any]", scope: Message, body: bytes) -> None:
        super().__init__()
        self._replicas = replicas
        self._request = scope, body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the messages. A request is repeated if its replica dies before there is anything to send."""
        for _ in range(_ATTEMPTS):
            begun = False
            try:
                async for messages in self._messages():
                    begun = True
                    for message in messages:
                        await send(message)
                return
            except BackPressureError as error:
                return await _refuse(str(error), 429, scope, receive, send)
            except RayActorError:
                if begun:  # only streams of events come in parts
                    event = json.dumps(error_body("the replica that answered has died", 503))
                    return await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode()})
        await _refuse(f"the replicas that answered have died, {_ATTEMPTS} of them", 503, scope, receive, send)

    async def _messages(self) -> AsyncIterator[list[Message]]:
        """The messages; the first one with the second, since nothing is lost before there is a body."""
        answer = self._replicas.remote(*self._request)
        held: list[Message] = []
        try:
            async for message in answer:
                held.append(message)
                if message["type"] != "http.response.start":
                    yield held
                    held = []
        finally:
            answer.cancel()


async def _refuse(message: str, status: int, scope: Any, receive: Any, send: Any) -> None:
    await JSONResponse(error_body(message, status), status_code=status)(scope, receive, send)


def session_of(body: bytes, chars: int) -> str:
    """What stands for the beginning of a request's prompt or messages; empty if it has none."""
    try:
        fields = json.loads(body)
        begin = fields["prompt"] if "prompt" in fields else fields["messages"]
        text = json.dumps(begin)[:chars]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def application(
    source: "Source",
    settings: Settings,
    engine: dict[str, Any],
    *,
    replicas: int,
    doors: int,
    cpus: float,
    threads: int,
    prefix_chars: int,
    warm_up: bool,
) -> Any:
    """The two deployments; arguments are those of `ray_serve.app`, checked."""
    router = RequestRouterConfig(
        request_router_class=f"{PrefixRouter.__module__}.{PrefixRouter.__name__}",
        request_router_kwargs={"num_fallback_replicas": max(replicas - 1, 1)},  # all the others
    )
    behind = serve.deployment(
        Replica,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=2 * engine["slots"],
        max_queued_requests=engine["max_waiting"],
        request_router_config=router,
    ).bind(source, settings, engine, threads, warm_up)
    front = serve.deployment(Door, num_replicas=doors, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_OPEN)
    return front.bind(behind, settings.max_body, prefix_chars)
