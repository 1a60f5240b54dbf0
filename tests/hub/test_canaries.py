"""Canary tokens, planted wherever a user may have a real one, reach nothing that goes up."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from tests.hub.conftest import OWNER_TOKEN
from tests.hub_server import HubServer
from tests.hub_server.client import Client, Reply

IN_ENVIRONMENT = "CanaryInEnvironment-91xq"
IN_CONFIG = "CanaryInConfig-55rt"
IN_ROW = "CanaryInRow-73zv"
SHAPED = "hf_" + "CanaryShape" * 3 + "77"


@pytest.fixture(params=["lfs", "xet"])
def client(request: pytest.FixtureRequest, clients: Callable[[str], Client]) -> Iterator[Client]:
    """Both upload paths, with a canary in the environment."""
    found = clients(request.param)
    found.do("setenv", SOME_SERVICE_API_KEY=IN_ENVIRONMENT)
    yield found
    found.do("setenv", SOME_SERVICE_API_KEY=None)


def spelled(canary: str) -> list[bytes]:
    """A canary as it may stand in a body: also inside the Base64 of a commit, however it is aligned there."""
    raw = canary.encode()
    inside = [base64.b64encode(b"x" * shift + raw)[4:-4] for shift in range(3)]
    return [raw, canary.encode("utf-16-le"), *inside]


def assert_silent(hub: HubServer, reply: Reply, *canaries: str) -> None:
    sent = hub.sent_bytes()
    published = b"".join(data for repo in hub.store.repos.values() for data in repo.files().values())
    for canary in canaries:
        for form in spelled(canary):
            assert form not in sent, canary
            assert form not in published, canary
        assert canary not in reply.output
        assert canary not in str(reply.result)
        assert reply.failure is None or canary not in reply.failure.message


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_canaries_of_a_run_stay_here(
    method: str, client: Client, hub: HubServer, base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    repo_id = f"me/canary-{method}-{request.node.callspec.id}"
    reply = client.ask(
        "train",
        method=method,
        folder=str(tmp_path / "run"),
        base=str(base),
        options={"hub_model_id": repo_id, "hub_token": OWNER_TOKEN, "model_init_kwargs": {"token": IN_CONFIG}},
        row={"metadata": IN_ROW},
        then="push",
    )
    assert reply.failure is None, reply
    assert not [
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and OWNER_TOKEN.encode() in path.read_bytes()
    ]
    assert "adapter_model.safetensors" in hub.repo(repo_id).files()
    assert_silent(hub, reply, IN_ENVIRONMENT, IN_CONFIG, IN_ROW, OWNER_TOKEN)


@pytest.mark.parametrize("canary", [SHAPED, IN_ENVIRONMENT, OWNER_TOKEN])
@pytest.mark.parametrize("place", ["card", "tokenizer_config.json", "weights", "chat_template.jinja", "report.html"])
def test_a_canary_in_a_file_stops_everything(
    canary: str, place: str, client: Client, hub: HubServer, adapter: Path
) -> None:
    if place == "weights":
        (adapter / "adapter_model.safetensors").write_bytes(_with_metadata(adapter, canary))
        place = "adapter_model.safetensors"
    elif place == "card":
        (adapter / "README.md").write_text(f"# Mine\n\nMy own words, and {canary} among them.\n")
        place = "README.md"
    else:
        (adapter / place).write_text(f'{{"note": "{canary}"}}')
    reply = client.ask("publish", folder=str(adapter), repo_id="me/refused")
    assert reply.failure is not None
    assert reply.failure.kinds[0] == "SecretFound"
    assert place in reply.failure.message
    assert hub.requests == []
    assert_silent(hub, reply, canary)


def _with_metadata(adapter: Path, text: str) -> bytes:
    return save(load_file(adapter / "adapter_model.safetensors"), metadata={"note": text})


def test_a_canary_shaped_like_a_token_in_an_option_is_left_out(
    client: Client, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    """The option's name is harmless, so its value has to be known by its shape."""
    reply = client.ask(
        "train",
        method="dpo",
        folder=str(tmp_path / "run"),
        base=str(base),
        options={"hub_model_id": "me/shaped", "project": SHAPED},
    )
    assert reply.failure is None, reply
    assert "run_record.json" in hub.repo("me/shaped").files()
    assert SHAPED.encode() not in b"".join(hub.repo("me/shaped").files().values())
    assert SHAPED not in (tmp_path / "run" / "run_record.json").read_text(encoding="utf-8")
    assert_silent(hub, reply, SHAPED)


def test_paths_of_this_machine_stay_here(client: Client, hub: HubServer, base: Path, adapter: Path) -> None:
    assert str(base) in (adapter / "adapter_config.json").read_text()
    reply = client.ask("publish", folder=str(adapter), repo_id="me/no-paths")
    assert reply.failure is None, reply
    published = b"".join(hub.repo("me/no-paths").files().values())
    for path in (str(base), str(base.parent), str(adapter), str(Path.home()) + "/"):
        assert path.encode() not in published
        assert path.encode() not in hub.sent_bytes()
