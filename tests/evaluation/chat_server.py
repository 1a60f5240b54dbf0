"""A chat endpoint on the loopback interface, whose answers a test chooses request by request."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """One answer: a status, headers, a body, after a pause; `hang_up` closes the connection without one."""

    content: str | None = "A"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    pause_s: float = 0.0
    hang_up: bool = False

    def bytes(self) -> bytes:
        """The body: what was given, or a chat completion with the content."""
        if self.body is not None:
            return self.body
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": self.content}}]}).encode()


@dataclass
class Seen:
    """One request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def question(self) -> str:
        """What the user's turn says."""
        return self.body["messages"][-1]["content"]

    def answer(self, letter: str) -> str:
        """The text that is quoted as answer A or B."""
        found = re.search(rf"<<answer {letter} (\w+)>>\n(.*)\n<<end of answer {letter} \1>>", self.question, re.DOTALL)
        assert found is not None
        return found.group(2)


class ChatServer(ThreadingHTTPServer):
    """Answers each request with what `respond` makes of it, and remembers it."""

    daemon_threads = True

    def __init__(self, respond: Callable[[Seen], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond, self.seen = respond, []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The base address."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def enter(self, request: Seen) -> None:
        """Count a request in."""
        with self._lock:
            self.seen.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)

    def leave(self) -> None:
        """Count it out."""
        with self._lock:
            self._now -= 1


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Seen(self.path, dict(self.headers.items()), body)
        self.server.enter(request)
        try:
            reply = self.server.respond(request)
            time.sleep(reply.pause_s)
        finally:
            self.server.leave()  # before it is answered: the client's next request may be here sooner than this thread
        if not reply.hang_up:
            self._send(reply)

    def do_GET(self) -> None:
        self.server.enter(Seen(self.path, dict(self.headers.items()), {}))
        self.server.leave()
        self._send(Reply())

    def _send(self, reply: Reply) -> None:
        content = reply.bytes()
        try:
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def chat_server(respond: Callable[[Seen], Reply]) -> Iterator[ChatServer]:
    """A running server; it is gone afterwards."""
    server = ChatServer(respond)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
