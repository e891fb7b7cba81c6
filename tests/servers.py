"""A server for tests."""

import asyncio
import socket
import threading
import time

import uvicorn

from llorch_jax.serve.app import make_app


class Running:
    """A server in a thread."""

    def __init__(self, engine, settings):
        config = uvicorn.Config(make_app(engine, settings), log_level="error", ws="none")
        self.server = uvicorn.Server(config)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[self.socket])))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()
