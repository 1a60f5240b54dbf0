"""The endpoint judge against a real server on the loopback interface."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from alignkit.errors import ConfigError
from alignkit.evaluation.judge_endpoint import EndpointError, EndpointJudge, retry_after
from alignkit.evaluation.judges import make_judge
from tests.evaluation.chat_server import ChatServer, Reply, Seen, chat_server

KEY = "sk-canary-7f3a"
PROMPTS = ["p0", "p1", "p2"]
FIRST, SECOND = ["good", "bad", "good"], ["bad", "good", "good"]


def honest(request: Seen) -> Reply:
    """Prefers the answer that says "good"."""
    one, other = (request.answer(letter) == "good" for letter in "AB")
    return Reply("TIE" if one == other else "A" if one else "B")


def in_turn(*replies: Reply) -> Callable[[Seen], Reply]:
    """The given replies one after another; the last one for ever."""
    waiting = itertools.chain(replies, itertools.repeat(replies[-1]))
    return lambda request: next(waiting)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge(server: ChatServer, **options: Any) -> EndpointJudge:
    settings: dict[str, Any] = {"timeout_s": 5.0, "retries": 2, **options}
    return EndpointJudge(server.url, "judge-1", **settings)


def test_it_asks_and_reads_verdicts() -> None:
    with chat_server(honest) as server:
        asked = judge(server, options={"seed": 7})
        assert list(asked(PROMPTS, FIRST, SECOND)) == [1.0, 0.0, 0.5]
    assert {request.path for request in server.seen} == {"/v1/chat/completions"}
    body = server.seen[0].body
    assert (body["model"], body["temperature"], body["seed"]) == ("judge-1", 0, 7)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (asked.asked, asked.unparsed) == (3, 0)


def test_the_key_goes_into_the_header_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with caplog.at_level(logging.DEBUG), chat_server(in_turn(Reply(status=503), Reply(status=401))) as server:
        asked = judge(server, api_key_env="MY_KEY", concurrency=1)
        with pytest.raises(EndpointError) as caught:
            asked(PROMPTS[:1], FIRST[:1], SECOND[:1])
    assert [request.headers["Authorization"] for request in server.seen] == [f"Bearer {KEY}"] * 2
    assert all(KEY not in str(request.body) for request in server.seen)
    assert "the key is missing or wrong" in str(caught.value)
    assert KEY not in f"{caught.value}{caught.value.__cause__}{caplog.text}{vars(asked)}"


def test_without_a_key_no_header_is_sent_and_a_named_one_must_be_there() -> None:
    with chat_server(honest) as server:
        judge(server)(PROMPTS, FIRST, SECOND)
        assert all("Authorization" not in request.headers for request in server.seen)
        with pytest.raises(ConfigError, match="MY_KEY is not set"):
            judge(server, api_key_env="MY_KEY")(PROMPTS, FIRST, SECOND)


def test_a_key_does_not_cross_the_network_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    asked = EndpointJudge("http://judge.invalid/v1", "m", retries=0)
    with pytest.raises(ConfigError, match="use https"):
        asked(PROMPTS, FIRST, SECOND)


@pytest.mark.parametrize(
    "failure",
    [Reply(status=429, headers={"Retry-After": "0"}), Reply(status=500), Reply(hang_up=True), Reply(pause_s=1.0)],
    ids=["too many", "server error", "hung up", "too slow"],
)
def test_what_may_pass_is_asked_again(failure: Reply) -> None:
    with chat_server(in_turn(failure, Reply("B"))) as server:
        assert list(judge(server, timeout_s=0.4)(["p"], ["a"], ["b"])) == [0.0]
    assert len(server.seen) == 2


def test_retry_after_is_waited_for() -> None:
    with chat_server(in_turn(Reply(status=429, headers={"Retry-After": "0.7"}), Reply("A"))) as server:
        begin = time.monotonic()
        judge(server)(["p"], ["a"], ["b"])
        assert time.monotonic() - begin >= 0.7
    assert retry_after("Sun, 06 Nov 1994 08:49:37 GMT", now=784111777.0 - 5) == pytest.approx(5)
    assert (retry_after("999999"), retry_after("-3"), retry_after("soon"), retry_after(None)) == (60, 0, None, None)


def test_patience_ends() -> None:
    with chat_server(in_turn(Reply(status=503, headers={"Retry-After": "0"}))) as server:
        with pytest.raises(EndpointError, match=r"no answer after 3 requests \(HTTP 503\)"):
            judge(server, concurrency=1)(["p"], ["a"], ["b"])
        assert len(server.seen) == 3


def test_nobody_there() -> None:
    with chat_server(honest) as server:
        url = server.url
    with pytest.raises(EndpointError, match="ConnectionRefusedError"):
        EndpointJudge(url, "m", retries=0)(["p"], ["a"], ["b"])


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    with chat_server(in_turn(Reply(status=status))) as server:
        with pytest.raises(EndpointError, match=f"HTTP {status}"):
            judge(server, concurrency=1)(PROMPTS, FIRST, SECOND)
        assert len(server.seen) < 3


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server(honest) as elsewhere:
        away = Reply(status=302, headers={"Location": elsewhere.url})
        with chat_server(in_turn(away)) as server, pytest.raises(EndpointError, match="redirect"):
            judge(server)(["p"], ["a"], ["b"])
        assert elsewhere.seen == []


@pytest.mark.parametrize(
    "reply",
    [Reply("Both are fine."), Reply("A or B"), Reply(None), Reply(body=b"{}"), Reply(body=b"no json"), Reply("")],
)
def test_replies_without_a_verdict_are_counted_and_too_many_are_an_error(reply: Reply) -> None:
    def one_is_odd(request: Seen) -> Reply:
        return reply if "p3" in request.question else Reply("A")

    prompts = [f"p{number}" for number in range(10)]
    texts = ["a"] * 10, ["b"] * 10
    with chat_server(one_is_odd) as server:
        tolerant = judge(server, max_unparsed=0.1)
        assert list(tolerant(prompts, *texts)) == [1.0] * 3 + [None] + [1.0] * 6
        assert (tolerant.asked, tolerant.unparsed) == (10, 1)
        with pytest.raises(EndpointError, match="1 of 10 replies"):
            judge(server, max_unparsed=0.05)(prompts, *texts)


def test_requests_run_side_by_side_but_no_more_than_asked_for() -> None:
    with chat_server(lambda request: Reply("A", pause_s=0.05)) as server:
        judge(server, concurrency=3)(["p"] * 12, ["a"] * 12, ["b"] * 12)
        assert 2 <= server.most_at_once <= 3


def test_the_command_line_names_one() -> None:
    made = make_judge("qwen@http://localhost:8000/v1")
    assert isinstance(made, EndpointJudge)
    assert (made.url, made.model) == ("http://localhost:8000/v1/chat/completions", "qwen")


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("ftp://host/v1", {}),
        ("host/v1", {}),
        ("https://user:secret@host/v1", {}),
        ("https://host/v1", {"timeout_s": 0}),
        ("https://host/v1", {"retries": -1}),
        ("https://host/v1", {"concurrency": 0}),
        ("https://host/v1", {"max_unparsed": 1.5}),
    ],
)
def test_what_is_no_endpoint_is_refused_without_showing_a_password(address: str, options: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        EndpointJudge(address, "m", **options)
    assert "secret" not in str(caught.value)


def test_a_key_for_this_machine_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with chat_server(honest) as proxy, chat_server(honest) as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert list(judge(server)(PROMPTS, FIRST, SECOND)) == [1.0, 0.0, 0.5]
        assert (len(proxy.seen), len(server.seen)) == (0, 3)
