"""What goes wrong on the way is survived or explained, and never costs the local adapter."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.conftest import OTHER_TOKEN, OWNER_TOKEN, READ_TOKEN, snapshot
from tests.hub_server import HubServer
from tests.hub_server.client import Client, Reply

COMMIT, CREATE, INFO = "/commit/", "/api/repos/create", "/api/models/me/[^/]+$"
BATCH, OBJECT, XORB, SHARD = "/info/lfs/objects/batch", "^/objects/", "^/v1/xorbs/", "^/v1/shards"


@pytest.fixture
def adapter(make_adapter: Callable[..., Path], request: pytest.FixtureRequest) -> Iterator[Path]:
    """An adapter of its own for each test, which must come out of it byte for byte as it went in."""
    folder = make_adapter(zlib.crc32(request.node.name.encode()) % 2**31)
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


def attempt(client: Client, adapter: Path, name: str, **options) -> Reply:
    return client.ask("publish", folder=str(adapter), repo_id=f"me/{name}", **{"max_retries": 2, **options})


SURVIVED: dict[str, tuple[str, str, int | str, dict]] = {
    "create 429": ("POST", CREATE, 429, {"headers": {"Retry-After": "1"}}),
    "create reset": ("POST", CREATE, "reset", {}),
    "create lost": ("POST", CREATE, "lose", {}),
    "create hang": ("POST", CREATE, "hang", {}),
    "info 503": ("GET", INFO, 503, {}),
    "preupload 500": ("POST", "/preupload/", 500, {}),
    "batch 500": ("POST", BATCH, 500, {}),
    "object reset": ("PUT", OBJECT, "reset", {}),
    "object 500": ("PUT", OBJECT, 500, {}),
    "commit 429": ("POST", COMMIT, 429, {"headers": {"Retry-After": "1"}}),
    "commit 500": ("POST", COMMIT, 500, {}),
    "commit reset": ("POST", COMMIT, "reset", {}),
    "commit lost": ("POST", COMMIT, "lose", {}),
    "commit hang": ("POST", COMMIT, "hang", {}),
    "fetch 500": ("GET", "/tree/", 500, {}),
}


@pytest.mark.parametrize("name", SURVIVED)
def test_what_passes_is_survived(name: str, client: Client, hub: HubServer, adapter: Path) -> None:
    method, path, action, options = SURVIVED[name]
    repo = f"survives-{name.replace(' ', '-')}"
    with hub.failing(method, path, action, **options) as fault:
        reply = attempt(client, adapter, repo, timeout_s=3.0)
    assert fault.hit == 1
    assert reply.failure is None, reply.failure
    assert [commit.title[:11] for commit in hub.repo(f"me/{repo}").history()] == ["Upload with", "initial com"]
    assert reply.result["commit"] == hub.repo(f"me/{repo}").resolve("main").sha


@pytest.mark.parametrize(("path", "action"), [(XORB, 500), (XORB, "reset"), (SHARD, 500), ("/xet-write-token/", 500)])
def test_trouble_of_xet_storage_is_survived(
    path: str, action: int | str, clients: Callable[[str], Client], hub: HubServer, adapter: Path
) -> None:
    repo = f"xet-{action}-{path.strip('^/').replace('/', '-')}"
    with hub.failing("GET" if "token" in path else "POST", path, action) as fault:
        reply = attempt(clients("xet"), adapter, repo)
    assert fault.hit == 1
    assert reply.failure is None, reply.failure
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert hub.repo(f"me/{repo}").files()["adapter_model.safetensors"] == weights


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(
    client: Client, hub: HubServer, adapter: Path
) -> None:
    repo = hub.add_repo("other/lost-answer")
    with hub.failing("POST", COMMIT, "lose") as fault:
        reply = client.ask("publish", folder=str(adapter), repo_id=repo.repo_id, create_pr=True)
    assert fault.hit == 1
    assert reply.failure is None, reply.failure
    assert len(repo.discussions) == 1
    assert reply.result["pull_request"].endswith("/discussions/1")


EXPLAINED: dict[str, tuple[str, str, int | str, dict, str]] = {
    "401": ("GET", INFO, 401, {"message": "Invalid credentials in Authorization header"}, "does not accept the token"),
    "403 at create": ("POST", CREATE, 403, {}, "needs write access to"),
    "403 at commit": ("POST", COMMIT, 403, {}, "use create_pr=True"),
    "402": ("POST", BATCH, 402, {}, "asks for payment"),
    "404": ("POST", "/preupload/", 404, {}, "that this token can see (404)"),
    "409": ("POST", COMMIT, 409, {"message": "locked"}, "something else is in the way (409): locked"),
    "413": ("POST", COMMIT, 413, {"message": "too large"}, "the Hub refused it (413): too large"),
    "429 for ever": ("POST", COMMIT, 429, {"times": 9}, "asks to slow down (429)"),
    "429 for an hour": ("POST", COMMIT, 429, {"headers": {"Retry-After": "3600"}}, "asks to slow down (429)"),
    "500 for ever": ("POST", COMMIT, 500, {"times": 9}, "the Hub has trouble itself (500)"),
    "reset for ever": ("POST", COMMIT, "reset", {"times": 9}, "no answer from http://127.0.0.1"),
    "hang for ever": ("POST", COMMIT, "hang", {"times": 9}, "no answer from http://127.0.0.1"),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_does_not_pass_is_explained(name: str, client: Client, hub: HubServer, adapter: Path) -> None:
    method, path, action, options, said = EXPLAINED[name]
    repo = f"explains-{name.replace(' ', '-')}"
    with hub.failing(method, path, action, **options) as fault:
        reply = attempt(client, adapter, repo, timeout_s=1.0, max_retries=1)
    assert reply.failure is not None
    assert reply.failure.kinds[0] == "PublishError"
    assert f"'me/{repo}'" in reply.failure.message
    assert said in reply.failure.message
    assert fault.hit == (2 if "for ever" in name else 1)
    if f"me/{repo}" in hub.store.repos:
        assert len(hub.repo(f"me/{repo}").history()) == 1


@pytest.mark.parametrize(
    ("token", "repo_id", "said"),
    [
        ("hf_" + "revoked" * 5, "me/x", "does not accept the token (401)"),
        (READ_TOKEN, "me/read-only", "the token may not do that (403)"),
        (OTHER_TOKEN, "me/of-me", "the token may not do that (403)"),
    ],
)
def test_tokens_that_will_not_do(
    token: str, repo_id: str, said: str, client: Client, hub: HubServer, adapter: Path
) -> None:
    reply = client.ask("publish", folder=str(adapter), repo_id=repo_id, token=token)
    assert reply.failure is not None
    assert said in reply.failure.message
    assert repo_id not in hub.store.repos
    assert token not in reply.output + reply.failure.message


def test_a_private_repository_is_for_its_owner_alone(client: Client, hub: HubServer, adapter: Path) -> None:
    client.do("publish", folder=str(adapter), repo_id="me/hidden")
    files = client.ask("publish", folder=str(adapter), repo_id="me/hidden", token=OTHER_TOKEN)
    assert files.failure is not None
    assert "(403)" in files.failure.message
    client.do("setenv", HF_TOKEN=OTHER_TOKEN)
    try:
        assert client.ask("load", repo_id="me/hidden").failure is not None
    finally:
        client.do("setenv", HF_TOKEN=OWNER_TOKEN)


@pytest.mark.parametrize("path", ["lfs", "xet"])
def test_an_interrupted_upload_is_resumed(
    path: str, clients: Callable[[str], Client], hub: HubServer, adapter: Path
) -> None:
    repo = hub.add_repo(f"me/resumed-{path}", private=True)
    with hub.failing("POST", COMMIT, 403):
        failed = attempt(clients(path), adapter, f"resumed-{path}")
    assert failed.failure is not None
    assert len(repo.history()) == 1
    assert len(hub.uploads()) == 1
    done = attempt(clients(path), adapter, f"resumed-{path}")
    assert done.failure is None
    assert len(hub.uploads()) == 1, "what had arrived was sent again"
    assert repo.files()["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()


def test_what_arrived_is_checked(client: Client, hub: HubServer, adapter: Path) -> None:
    with hub.failing("GET", "/resolve/.*/tokenizer_config.json", "spoil") as fault:
        reply = attempt(client, adapter, "spoilt")
    assert fault.hit == 1
    assert reply.failure is not None
    assert reply.failure.kinds[0] == "PublishError"
    assert "does not hold what was sent: tokenizer_config.json" in reply.failure.message


def test_a_full_disk(client: Client, hub: HubServer, adapter: Path) -> None:
    """The process may write no file beyond 8 kB (RLIMIT_FSIZE), so the copy of the weights fails half-way."""
    client.do("limit_files", size=8_000)
    try:
        reply = attempt(client, adapter, "full-disk")
    finally:
        client.do("limit_files", size=None)
    assert reply.failure is not None
    assert reply.failure.kinds[0] == "PublishError"
    assert "the disk is full" in reply.failure.message
    assert "before anything was sent" in reply.failure.message
    assert hub.requests == []
    assert attempt(client, adapter, "full-disk").failure is None
