"""Running the application: socket, signals, and a shutdown within a time limit."""

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from llorch_jax.errors import EngineError
from llorch_jax.serve.app import Settings, make_app
from llorch_jax.text.engine import Engine


def serve(
    engine: Engine, settings: Settings, host: str, port: int, drain_seconds: float, prefixes: Path | None = None
) -> None:
    """Serves an engine until SIGTERM or SIGINT; then finishes running requests, up to a limit, and closes the engine.

    Args:
        engine: the engine that answers the requests; it is closed at the end.
        settings: settings of the server.
        host: address to listen on.
        port: port to listen on; 0 for any free port.
        drain_seconds: seconds for which running requests may continue at the end.
        prefixes: file to which the prefix cache is written at the end.

    Raises:
        EngineError: the address cannot be used.
        CheckpointError: the model's chat template is damaged.
    """
    try:
        app = make_app(engine, settings)
        listening = _listen(host, port)
    except BaseException:
        engine.close(drain=False)
        raise
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, int(drain_seconds)),
        timeout_keep_alive=30,
        server_header=False,
    )
    place = _place(*listening.getsockname()[:2])
    try:
        _Server(config, f"serving {settings.name} at http://{place}").run(sockets=[listening])
        if prefixes is not None:
            engine.save_prefixes(prefixes)
    finally:
        engine.close(timeout=drain_seconds)


class _Server(uvicorn.Server):
    """On the first SIGTERM or SIGINT ends as soon as its requests are answered; on the second, at once."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the server, and prints that it is ready."""
        await super().startup(sockets)
        print(self._ready, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As in the base class, which however would raise the signals again at the end and so kill the process."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._end) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def _place(host: str, port: int) -> str:
    """Address and port as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        EngineError: the address is not one, not this machine's, or taken.
    """
    try:
        return _listening(host, port)
    except (OSError, ValueError) as error:  # a ValueError for a name that cannot be one, such as a label of 64 letters
        reason = getattr(error, "strerror", None) or error
        raise EngineError(f"host and port: cannot listen on {_place(host, port)} ({reason})") from None


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except BaseException:
        listening.close()
        raise
    return listening
