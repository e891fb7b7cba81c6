"""llama.cpp's own server: the program `llama-server` beside this Python, with float32 weights, keys and values.

    {"op": "start", "directory": D, "work": W, "threads": N, "slots": S, "context": C, "unified": U}

Answer: {"socket": a Unix socket, "versions": {...}, "build": "..."}. S requests run at the same time, each with room
for C tokens, in one buffer that they share (U) or in one each. The server ends with this worker. Everything else is
llama-server's default, except that it keeps no prompts of past requests.
"""

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lcpp_files import convert
from worker import answer_requests

TOLD = r"build \d+ \(.*|system_info: .*[^|\s]"  # what the log says of the program itself


def start(directory: str, work: str, threads: int, slots: int, context: int, unified: bool) -> dict[str, Any]:
    program = Path(sys.executable).with_name("llama-server")
    if not program.exists():
        raise FileNotFoundError(f"expected llama.cpp's server at {program}; docs/benchmarks.md says how to build it")
    model = convert(directory, work, "f32", threads)
    address, log = f"{work}/{os.getpid()}.sock", Path(work) / f"{os.getpid()}.log"
    options: dict[str, Any] = {
        "--model": model,
        "--host": address,
        "--threads": threads,
        "--parallel": slots,
        "--ctx-size": slots * context,
        "--cache-type-k": "f32",
        "--cache-type-v": "f32",
        "--cache-ram": 0,
        "--log-verbosity": 4,  # says how the program was built
    }
    words = [str(word) for option in options.items() for word in option]
    words.append("--kv-unified" if unified else "--no-kv-unified")
    with log.open("w") as file:
        server = subprocess.Popen([program, *words], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    atexit.register(server.kill)
    while not _ready(address):
        if server.poll() is not None:
            raise RuntimeError(f"llama-server ended with exit code {server.returncode}: {log.read_text()[-500:]}")
        time.sleep(0.05)
    build = "; ".join(re.findall(TOLD, log.read_text()))
    return {"socket": address, "versions": {"llama-cpp-python": version("llama-cpp-python")}, "build": build}


def _ready(address: str) -> bool:
    """Whether the server answers, with the model loaded."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(64)
        except OSError:
            return False


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the server is ended as well
    answer_requests({"start": start})
