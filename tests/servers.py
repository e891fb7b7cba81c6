"""Servers for tests: one in a thread with a socket, and an application that is called without one."""

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


async def post(app, path, body):
    """Status and body of the answer to a request, given to the application as a server would give it.

    An exception that escapes from the application escapes from here, too.
    """
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    sent = []

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    about = {"http_version": "1.1", "scheme": "http", "query_string": b"", "root_path": "", "headers": []}
    await app({"type": "http", "method": "POST", "path": path, **about}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
