"""Requests that go wrong on purpose."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .wire import Request


@dataclass(slots=True)
class Fault:
    """What happens to requests that match.

    `action` is an HTTP status; `"hang"`: no answer until the client gives up; `"reset"`: the connection is reset before
    anything is done; `"lose"`: the request is carried out, and then the connection is reset instead of answered;
    `"spoil"`: the answer's bytes are reversed.
    The first `skip` matching requests pass, the next `times` fail.
    """

    method: str
    path: str  # a regular expression, searched for in the unquoted path
    action: int | str
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "the server was told to fail"
    seen: int = 0
    hit: int = 0

    def strikes(self, request: Request, path: str) -> bool:
        """Count a request; tell whether it is one that fails."""
        if request.method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        if not self.skip < self.seen <= self.skip + self.times:
            return False
        self.hit += 1
        return True
