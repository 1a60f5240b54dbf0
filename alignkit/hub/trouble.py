"""Asking the Hub with patience: what passes by itself is tried again, what does not is explained in one sentence."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from alignkit.errors import PublishError, printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_PAUSE_SECONDS = 30.0
_LONGEST_RETRY_AFTER_SECONDS = 600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# hf_xet is compiled and tells the status in its message alone.
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
AGAIN = "Run the same command again: what has arrived is not sent a second time."


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to keep trying.

    Attributes:
        max_retries: further attempts after the first, with pauses of 1, 2, 4, … 30 seconds, or what the Hub asks for.
        timeout_s: seconds without an answer after which an attempt has failed. huggingface_hub itself sets no limit.
    """

    max_retries: int = 5
    timeout_s: float = 120.0

    def ask(self, action: Callable[[], T], doing: str, repo_id: str) -> T:
        """Return what `action` returns; try again where that can help.

        Args:
            action: a call of huggingface_hub that may be repeated.
            doing: what it does, for the message, such as "upload files".
            repo_id: the repository.

        Raises:
            PublishError: it cannot be done, with the remedy.
        """
        attempt = 0
        while True:
            try:
                with _time_limit(self.timeout_s):
                    return action()
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                trouble = diagnose(error, repo_id)
                pause = min(2.0**attempt, _LONGEST_PAUSE_SECONDS)
                if trouble.retry_after is not None:
                    pause = trouble.retry_after
                if not trouble.passes or attempt >= self.max_retries or pause > _LONGEST_RETRY_AFTER_SECONDS:
                    tried = f" ({attempt + 1} attempts)" if attempt else ""
                    raise PublishError(f"could not {doing} for '{repo_id}'{tried}: {trouble.text}") from error
                attempt += 1
                logger.warning(
                    "Could not %s: %s Trying again in %.0f s (%d of %d).",
                    doing,
                    printable(trouble.text),
                    pause,
                    attempt,
                    self.max_retries,
                )
                time.sleep(pause)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    client = get_session()  # shared by all of huggingface_hub, so it gets its own limit back
    before, client.timeout = client.timeout, seconds
    try:
        yield
    finally:
        client.timeout = before


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a call failed; `passes` if it may succeed when tried again, `retry_after` seconds if the Hub said so."""

    text: str
    passes: bool = False
    retry_after: float | None = None
    status: int | None = None


def diagnose(error: BaseException, repo_id: str) -> Trouble:
    """Say why a call of huggingface_hub failed, and what to do about it."""
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, HfHubHTTPError):
            return _refused(cause, repo_id)
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return Trouble(
                f"the disk is full ({cause.strerror}). Nothing on it was changed. Free some space, or point TMPDIR and "
                "HF_HOME to another disk, and run the same command again."
            )
        if isinstance(cause, OfflineModeIsEnabled):
            return Trouble("the Hub is switched off here: unset HF_HUB_OFFLINE and run the same command again.")
        if isinstance(cause, LocalTokenNotFoundError):
            return Trouble(_LOG_IN)
    for cause in chain:
        found = _XET_STATUS.search(str(cause))
        if found is not None:
            return _by_status(int(found[1]), _first_line(cause), repo_id, None, tried_enough=True)
        if isinstance(cause, HTTPError):
            text = f"no answer from {constants.ENDPOINT} ({type(cause).__name__}: {_first_line(cause)}). {AGAIN}"
            return Trouble(text, passes=True)
        if isinstance(cause, ConnectionError | TimeoutError):
            return Trouble(f"the connection broke ({_first_line(cause)}). {AGAIN}", passes=True)
    return Trouble(f"{_first_line(error)}")


def _refused(error: HfHubHTTPError, repo_id: str) -> Trouble:
    response = error.response
    said = response.headers.get("X-Error-Message") or _first_line(error)
    if isinstance(error, RevisionNotFoundError):
        return Trouble(f"the repository has no such branch or revision: {said}", status=404)
    return _by_status(response.status_code, said, repo_id, _seconds(response.headers.get("Retry-After")))


_LOG_IN = (
    "there is no token. Create one with write access in the Hub's settings and run `hf auth login`, or set HF_TOKEN."
)


def _by_status(
    status: int, said: str, repo_id: str, retry_after: float | None, *, tried_enough: bool = False
) -> Trouble:
    owner = repo_id.split("/")[0]
    sentences = {
        401: "the Hub does not accept the token (401). It may have expired or been revoked: create one with write "
        "access in the Hub's settings and run `hf auth login`, or pass token=.",
        402: f"the Hub asks for payment (402): {said}. Private storage may be used up: free some, or publish with "
        "private=False.",
        403: f"the token may not do that (403): {said}. It needs write access to '{repo_id}' (a fine-grained token, "
        f"to repositories of '{owner}'); for a repository of somebody else use create_pr=True.",
        404: f"the Hub has no '{repo_id}' that this token can see (404). Check the name, and the token with "
        "`hf auth whoami`.",
        409: f"the Hub says that something else is in the way (409): {said}. Somebody may be changing the repository: "
        "look at it, then run the same command again.",
        412: "the repository changed in the meantime (412). Run the same command again.",
        429: f"the Hub asks to slow down (429). {AGAIN}",
    }
    if status >= 500:
        return Trouble(f"the Hub has trouble itself ({status}). {AGAIN}", not tried_enough, retry_after, status)
    text = sentences.get(status, f"the Hub refused it ({status}): {said}")
    return Trouble(text, status in (412, 429) and not tried_enough, retry_after, status)


def _seconds(retry_after: str | None) -> float | None:
    """Read a Retry-After header: seconds, or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):
        return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
