"""An endpoint that speaks OpenAI's chat protocol as a judge: a hosted model, or vLLM, llama.cpp and Ollama at home."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import logging
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from alignkit.data.records import Text
from alignkit.errors import AlignkitError, ConfigError
from alignkit.evaluation.judge_prompt import judge_question, read_verdict
from alignkit.evaluation.judges import Verdicts

logger = logging.getLogger(__name__)

DEFAULT_KEY_ENV = "OPENAI_API_KEY"
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0
_LONGEST_REPLY_BYTES = 4 << 20
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class EndpointError(AlignkitError, RuntimeError):
    """An endpoint that did not answer, refused, or answered something that cannot be used."""


class EndpointJudge:
    """A chat model behind `POST {base_url}/chat/completions`, asked for one word.

    The key is read from the environment at each call and goes into the request's `Authorization` header alone: it is
    kept nowhere, shown in no message, and sent to no other host, since redirects are refused. Texts of the data go to
    the endpoint; nothing else does.

    Args:
        base_url: such as "https://api.openai.com/v1" or "http://localhost:8000/v1".
        model: the name that the endpoint knows it by.
        api_key_env: the environment variable that holds the key; None for an endpoint without one. One that is not set
            is an error, but for the default.
        timeout_s: longest wait for an answer.
        retries: how often a request is repeated after a timeout, a broken connection, or an answer that says "later"
            (429 and 5xx), after what `Retry-After` says, or else after a pause that doubles.
        concurrency: requests at a time.
        max_unparsed: the share of replies that may hold no verdict; more is an error.
        max_tokens: of a reply. Models that think before they answer need more.
        options: further fields of the request, such as `{"seed": 1}`.
        name: for results; by default the model's.

    Attributes:
        asked, unparsed: questions so far, and those whose reply held no verdict.

    Raises:
        ConfigError: an address that is none, plain http to another machine with a key, or numbers out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = DEFAULT_KEY_ENV,
        timeout_s: float = 60.0,
        retries: int = 5,
        concurrency: int = 4,
        max_unparsed: float = 0.1,
        max_tokens: int = 16,
        options: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        address = urllib.parse.urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname or address.username or address.query:
            raise ConfigError(
                "the endpoint's address must look like https://host/v1, without a user, a password or a query"
            )
        for option, value, low in (
            ("timeout_s", timeout_s, 0.001),
            ("retries", retries, 0),
            ("max_tokens", max_tokens, 1),
        ):
            if value < low:
                raise ConfigError(f"{option}={value} of the endpoint must be at least {low}")
        if concurrency < 1 or not 0 <= max_unparsed <= 1:
            raise ConfigError(f"concurrency={concurrency} must be 1 or more, max_unparsed={max_unparsed} from 0 to 1")
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.model, self.name = model, name or f"endpoint {model}"
        self.api_key_env, self.timeout_s, self.retries = api_key_env, timeout_s, retries
        self.concurrency, self.max_unparsed = concurrency, max_unparsed
        self.max_tokens, self.options = max_tokens, dict(options or {})
        self.asked = self.unparsed = 0
        self._is_local = address.hostname in _LOCAL_HOSTS
        # What is meant for this machine, in clear and with a key, goes through no proxy of the environment.
        proxies = [urllib.request.ProxyHandler({})] if self._is_local else []
        self._opener = urllib.request.build_opener(_NoRedirect(), *proxies)

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """Ask every question; 1 for A, 0 for B, 0.5 for TIE, None for a reply without a verdict.

        Raises:
            EndpointError: no answer after all retries, a refusal, or too many replies without a verdict.
            ConfigError: the environment variable of the key is not set.
        """
        headers = self._headers()
        questions = list(zip(prompts, first, second, strict=True))
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [pool.submit(self._verdict, *texts, headers) for texts in questions]
            try:
                verdicts = [future.result() for future in waiting]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)  # one refusal is enough
                raise
        self.asked += len(verdicts)
        self.unparsed += verdicts.count(None)
        if self.unparsed > self.max_unparsed * self.asked:
            raise EndpointError(
                f"{self.unparsed} of {self.asked} replies of '{self.model}' hold no verdict (A, B or TIE), more than "
                f"max_unparsed={self.max_unparsed}. Ask a stronger model, or one that thinks first with a larger "
                "max_tokens."
            )
        return verdicts

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "alignkit"}
        key = "" if self.api_key_env is None else os.environ.get(self.api_key_env, "").strip()
        if not key:
            if self.api_key_env not in (None, DEFAULT_KEY_ENV):
                raise ConfigError(
                    f"the environment variable {self.api_key_env} is not set: put the endpoint's key into it, or pass "
                    "api_key_env=None for an endpoint without one"
                )
            return headers
        if self.url.startswith("http://") and not self._is_local:
            raise ConfigError("the endpoint's key would cross the network in clear: use https, or api_key_env=None")
        return {**headers, "Authorization": f"Bearer {key}"}

    def _verdict(self, prompt: Text, first: str, second: str, headers: dict[str, str]) -> float | None:
        asked = judge_question(prompt, first, second)
        fields = {"model": self.model, "messages": asked.messages, "temperature": 0, "max_tokens": self.max_tokens}
        body = json.dumps({**fields, **self.options}).encode()
        return read_verdict(_content(self._post(body, headers)))

    def _post(self, body: bytes, headers: dict[str, str]) -> bytes:
        problem = ""
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
            pause: float | None = None
            try:
                with self._opener.open(request, timeout=self.timeout_s) as answer:
                    return answer.read(_LONGEST_REPLY_BYTES)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in _RETRIED:
                        raise EndpointError(_refusal(self.url, error.code)) from None
                    problem, pause = f"HTTP {error.code}", retry_after(error.headers.get("Retry-After"))
            except (TimeoutError, urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
                problem = _reason(error)
            if attempt < self.retries:
                seconds = min(2.0**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1) if pause is None else pause
                logger.info("%s from %s: asked again in %.1f s.", problem, self.url, seconds)
                time.sleep(seconds)
        raise EndpointError(
            f"{self.url} gave no answer after {self.retries + 1} requests ({problem}). Is it running? A larger "
            "timeout_s, more retries or a smaller concurrency may help."
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another address, and turn the question into one without a body."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for (RFC 9110, section 10.2.3), at most a minute; None without one."""
    if value is None:
        return None
    seconds: float | None = None
    with contextlib.suppress(ValueError):
        seconds = float(value)
    if seconds is None:
        with contextlib.suppress(ValueError, TypeError):
            moment = email.utils.parsedate_to_datetime(value)
            seconds = moment.timestamp() - (time.time() if now is None else now)
    if seconds is None or seconds != seconds:
        return None
    return min(max(0.0, seconds), _LONGEST_WAIT_S)


def _content(reply: bytes) -> str | None:
    """The text of the first choice, or None where the reply has another form."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else None


def _refusal(url: str, status: int) -> str:
    meanings = {
        401: "the key is missing or wrong",
        403: "the key may not use this model",
        404: "there is no such address or model",
    }
    what = meanings.get(
        status, "a redirect, which is not followed" if 300 <= status < 400 else "the request is refused"
    )
    return f"{url} answered HTTP {status}: {what}. Check base_url, model and the environment variable of the key."


def _reason(error: BaseException) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"{type(inner).__name__}" if isinstance(inner, BaseException) else str(inner)
