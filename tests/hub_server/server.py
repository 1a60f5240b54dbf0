"""The server itself: a socket, routing, the record of requests, and faults."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from . import api, files, lfs, xet
from .faults import Fault
from .store import Repo, Store, User
from .wire import HubError, Request, Response, Routes, answer, parse_query

HANG_SECONDS = 30


class HubServer:
    """The Hub on loopback; use it as a context manager.

    Attributes:
        url: what goes into `HF_ENDPOINT`.
        cdn: the same server under another origin, where objects are stored, as on the Hub.
        store, cas: the state; `requests`: everything that came in; `crashes`: errors of this server itself.
        multipart_bytes: LFS objects above this size are uploaded in parts of this size.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.cas = xet.CAS()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.crashes: list[str] = []
        self.multipart_bytes: int | None = None
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._http = _HTTPServer(("127.0.0.1", 0), _RequestHandler)
        self._http.hub = self
        port = self._http.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self._routes = Routes()
        for module in (api, lfs, files, xet):
            module.register(self._routes, self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def add_user(self, name: str, token: str, *, can_write: bool = True) -> None:
        self.store.users[token] = User(name, can_write)

    def add_repo(self, repo_id: str, *, private: bool = False) -> Repo:
        self.store.repos[repo_id] = Repo(repo_id, private)
        return self.store.repos[repo_id]

    def repo(self, repo_id: str) -> Repo:
        return self.store.repos[repo_id]

    @contextlib.contextmanager
    def failing(self, method: str, path: str, action: int | str, **options: Any) -> Iterator[Fault]:
        """Make matching requests fail for as long as the context lasts; see `Fault`."""
        fault = Fault(method, path, action, **options)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def uploads(self) -> list[Request]:
        """Return the requests that carried content: LFS objects and xorbs."""
        return [
            request
            for request in self.requests
            if (request.method == "PUT" and request.path.startswith("/objects/"))
            or (request.method == "POST" and request.path.startswith("/v1/xorbs/"))
        ]

    def sent_bytes(self) -> bytes:
        """Return all that came in: request lines, headers and bodies, except the header that authenticates."""
        pieces = []
        for request in list(self.requests):
            headers = {name: value for name, value in request.headers.items() if name != "authorization"}
            pieces.append(f"{request.method} {request.path} {request.query} {headers}\n".encode() + request.body)
        return b"\n".join(pieces)

    def handle(self, request: Request) -> Response | str:
        """Answer a request, or say what is done to its connection."""
        path = unquote(request.path)
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.strikes(request, path)), None)
        if fault is not None and isinstance(fault.action, int):
            request.status = fault.action
            failed = HubError(fault.action, fault.message).response
            failed.headers.update(fault.headers)
            return failed
        if fault is not None and fault.action == "hang":
            request.status = "hang"
            self._closing.wait(HANG_SECONDS)
            return "reset"
        if fault is not None and fault.action == "reset":
            request.status = "reset"
            return "reset"
        response = self._answer(request)
        request.status = response.status
        if fault is not None and fault.action == "spoil":
            response.body = response.body[::-1]
            return response
        if fault is not None:
            request.status = "lost"
            return "reset"
        return response

    def _answer(self, request: Request) -> Response:
        found = self._routes.find(request.method, request.path)
        if found is None:
            return answer({"error": f"no such route: {request.method} {request.path}"}, 404)
        handler, arguments = found
        try:
            with self._lock:
                return handler(request, **arguments)
        except HubError as error:
            return error.response
        except Exception:  # noqa: BLE001 (a fault of this server, which the tests must see)
            self.crashes.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
            return answer({"error": "the test server crashed"}, 500)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, *_: object) -> None:
        """A client that went away in the middle is part of the tests, and no reason to print a traceback."""


class _RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HTTPServer

    def _respond(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        if headers.get("expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        request = Request(self.command, parts.path, parse_query(parts.query), headers, self._body(headers))
        response = self.server.hub.handle(request)
        if isinstance(response, str):
            self._reset()
            return
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in response.headers:
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _respond  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Stay quiet: the record of requests is better than a log."""
