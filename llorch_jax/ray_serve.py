"""The server on a Ray cluster: an application for Ray Serve, whose replicas each have a model and an engine.

Ray Serve listens on every node, starts the replicas, replaces those that die, and counts requests. Here is only what it
is told: what a replica does (`ray_replicas`), and which one a request should get. Ray is imported when it is used.
"""

import inspect
import math
from typing import TYPE_CHECKING, Any

from llorch_jax.cache.codecs import make_codec
from llorch_jax.errors import ClusterError, EngineError
from llorch_jax.loading.checkpoint import PathLike
from llorch_jax.ray import Pool, Source
from llorch_jax.text.engine import Engine
from llorch_jax.tracing import whole

if TYPE_CHECKING:
    from ray.serve import Application

PREFIX_CHARS = 256  # some two pages of tokens: with less in common, requests have next to nothing to share


def app(
    model: PathLike = "demo",
    *,
    weights: Any = None,
    group_size: int | None = None,
    replicas: int = 2,
    cpus: float = 1,
    doors: int = 2,
    prefix_chars: int = PREFIX_CHARS,
    name: str | None = None,
    api_key: str | None = None,
    max_body: int = 1 << 20,
    max_texts: int = 64,
    warm_up: bool = True,
    **engine: Any,
) -> "Application":
    """The HTTP server of `llorch-jax serve` as an application for `ray.serve.run`.

    Every replica loads the model and has an engine with a prefix cache of its own. Requests that begin alike go to the
    same replica, unless it has more than its share of the requests under way: see `ray_replicas.PrefixRouter`. A
    request goes by the header `x-session-id` instead if it has one.

    Args:
        model: as for `load`; a directory must be at the same place on every machine.
        weights: how the weights are kept, as for `load`.
        group_size: as for `load`.
        replicas: number of replicas.
        cpus: processors of each replica: Ray reserves them, and XLA starts as many threads.
        doors: number of replicas of the deployment that takes requests and passes them on; it needs no processor of
            its own.
        prefix_chars: number of characters by which requests are told apart.
        name: name of the model in answers; by default its own.
        api_key: key that clients must send as a bearer token; None for none.
        max_body: maximum size of a request's body, in bytes.
        max_texts: maximum number of texts per request.
        warm_up: whether a replica compiles everything before it takes requests.
        engine: settings of `Engine`.

    Raises:
        ClusterError: the extra `ray-serve` is missing, or a number is invalid.
        CheckpointError: there is no such model.
        EngineError: a setting of the engine is unknown or invalid.
        CacheError: the codec is unknown.
    """
    _require_serve()
    from llorch_jax.ray_replicas import application
    from llorch_jax.serve.app import Settings

    for what, number in {"replicas": replicas, "doors": doors, "prefix_chars": prefix_chars}.items():
        whole(what, number, ClusterError)
    for what, number in {"max_body": max_body, "max_texts": max_texts}.items():
        whole(what, number, EngineError)
    if api_key == "":
        raise EngineError("api_key: expected a key that is not empty")
    pool = Pool(replicas, cpus)
    source = Source.of(model, weights, group_size)
    settings = Settings(name or "", api_key, max_body, max_texts)
    return application(
        source,
        settings,
        _checked(engine),
        replicas=replicas,
        doors=doors,
        cpus=pool.cpus,
        threads=math.ceil(pool.cpus),
        prefix_chars=prefix_chars,
        warm_up=warm_up,
    )


def _checked(engine: dict[str, Any]) -> dict[str, Any]:
    """Settings of an engine, all of them, as far as they can be checked without the model."""
    known = {name: each.default for name, each in inspect.signature(Engine).parameters.items() if name != "model"}
    for name, value in engine.items():
        if name not in known:
            raise EngineError(f"{name:.80}: expected a setting of the engine ({', '.join(known)}), got an unknown one")
        if value is None and known[name] is None:
            continue
        if name == "codec":
            make_codec(value, 64)
        else:
            whole(name, value, EngineError, least=0 if known[name] == 0 else 1)
    return known | engine


def _require_serve() -> None:
    """Raises ClusterError unless Ray Serve and the server can be imported."""
    try:
        import mmh3  # noqa: F401  for Ray's consistent hashing
        from ray import serve  # noqa: F401

        import llorch_jax.serve.app  # noqa: F401
    except ImportError as error:
        raise ClusterError(
            f"ray_serve: expected the extra `ray-serve`, got no {error.name}; install it with "
            "pip install 'llorch-jax[ray-serve]'"
        ) from None
