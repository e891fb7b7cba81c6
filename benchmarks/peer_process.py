"""Our side of the peers' protocol: one process per peer, in its own Python (benchmarks/peers/worker.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = {"transformers": "hf.py", "ctranslate2": "ct2.py", "llama.cpp": "lcpp.py"}
FOLDER = Path(__file__).parent / "peers"


class PeerError(RuntimeError):
    """A peer has ended, or answered with an error."""


class Peer:
    """A running peer; use it in a `with` statement."""

    def __init__(self, name: str, python: str, script: Path | None = None) -> None:
        """Starts the script of that name, or another one, in the given interpreter."""
        self.name = name
        command = [python, str(script or FOLDER / SCRIPTS[name])]
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # ours, which would make the peer import our packages
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment["PYTHONPATH"] = str(FOLDER)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, stderr=sys.stderr
        )
        self.variants: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.build = ""

    def load(self, directory: Path, work: Path, threads: int) -> None:
        """Loads a model in every variant that the peer has; each has the precision of its weights."""
        answer = self.ask(op="load", directory=str(directory), work=str(work), threads=threads)
        self.variants = answer["variants"]
        self.versions = answer["versions"]
        self.build = answer["build"]

    def generate(self, variant: str, tokens: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """Generates greedily: the new tokens of every row, and the seconds it took."""
        answer = self.ask(op="generate", variant=variant, tokens=tokens, new=new)
        return answer["tokens"], answer["seconds"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """The worker's answer to a request; `PeerError` if that is an error, or none comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{self.name}: ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
