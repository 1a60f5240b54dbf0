"""What goes over the wire: requests, responses, and the Hub's way of saying no."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote


@dataclass(slots=True)
class Request:
    """One request as it came in; `status` is what it was answered with, or what was done to it instead."""

    method: str
    path: str  # without the query, still quoted
    query: dict[str, str]
    headers: dict[str, str]  # lower-case names
    body: bytes
    status: int | str = 0

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def token(self) -> str | None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else None


@dataclass(slots=True)
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer that is an error: `code` goes into X-Error-Code, which the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        if code is not None:
            headers["X-Error-Code"] = code
        self.response = Response(status, json.dumps({"error": message, **body}).encode(), headers)


def answer(content: Any, status: int = 200, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, json.dumps(content).encode(), {"Content-Type": "application/json", **named})


def parse_query(query: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}


Handler = Callable[..., Response]


class Routes:
    """Functions by method and path pattern; the named groups of a pattern become arguments, unquoted."""

    def __init__(self) -> None:
        self._rows: list[tuple[frozenset[str], re.Pattern[str], Handler]] = []

    def on(self, methods: str, pattern: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            self._rows.append((frozenset(methods.split()), re.compile(pattern), handler))
            return handler

        return register

    def find(self, method: str, path: str) -> tuple[Handler, dict[str, str]] | None:
        for methods, pattern, handler in self._rows:
            if method in methods and (match := pattern.fullmatch(path)):
                return handler, {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        return None


REPO = r"(?P<repo_id>[^/]+/[^/]+)"
KIND = r"(?:models)"
REVISION = r"(?P<revision>[^/]+)"
