"""The other end of `worker.py`: a client process that a test gives tasks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_OURS = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE")


class Failure(NamedTuple):
    """What a task raised: the names of its classes, the nearest first, and its message."""

    kinds: tuple[str, ...]
    message: str


class Reply(NamedTuple):
    """What came of a task; `output` is everything that was printed, logged and warned meanwhile."""

    result: Any
    failure: Failure | None
    output: str


def inherited_environment() -> dict[str, str]:
    """The environment without what would lead a client elsewhere, keep it offline or give it a token."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}


class Client:
    """A process in which the real huggingface_hub talks to the server at `url`."""

    def __init__(self, url: str, token: str, home: Path, *, xet: bool, **environment: str) -> None:
        inherited = inherited_environment()
        settings = {
            "HF_ENDPOINT": url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "20",
            "PYTHONPATH": str(ROOT),
        }
        self._errors = (home.parent / f"{home.name}.err").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_server.worker"],
            cwd=ROOT,
            env={**inherited, **settings, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._read()

    def ask(self, task: str, **arguments: Any) -> Reply:
        """Run a task; return what came of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._read())
        failure = reply.get("error")
        failed = None if failure is None else Failure(tuple(failure["kinds"]), failure["message"])
        return Reply(reply.get("result"), failed, reply["output"])

    def do(self, task: str, **arguments: Any) -> Any:
        """Run a task that must succeed; return its result."""
        reply = self.ask(task, **arguments)
        assert reply.failure is None, f"{reply.failure}\n{reply.output}"
        return reply.result

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise AssertionError(f"the client process ended: {self._errors.read()[-3000:]}")
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait(timeout=30)
        self._errors.close()
