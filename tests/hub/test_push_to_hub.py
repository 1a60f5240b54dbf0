"""`push_to_hub=True` publishes as `alignkit.publish` does: nothing early, nothing private, no whole checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hub.conftest import BASE_ID, OTHER_TOKEN, OWNER_TOKEN
from tests.hub_server import HubServer
from tests.hub_server.client import Client
from tests.hub_server.worker import IDS

WRITING = ("POST", "PUT", "DELETE")


def written(hub: HubServer) -> list[str]:
    return [request.path for request in hub.requests if request.method in WRITING]


@pytest.mark.parametrize("method", ["dpo", "reward", "ppo"])
def test_every_trainer_pushes_its_policy_privately(
    method: str, client: Client, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    folder, repo_id = str(tmp_path / "run"), f"me/push-{method}"
    found = client.do("train", method=method, folder=folder, base=str(base), options={"hub_model_id": repo_id})
    repo = hub.repo(repo_id)
    assert repo.private
    assert found["commit"] == repo.resolve("main").sha
    assert "gives the same logits" in found["verified"]
    assert set(repo.files()) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "run_record.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert b"alignkit" in repo.files()["README.md"]
    assert len(repo.history()) == 2
    assert repo.history()[0].title == "End of training"


def test_publishing_a_trainer_whose_base_the_user_names(
    client: Client, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    found = client.do(
        "train",
        method="dpo",
        folder=str(tmp_path / "run"),
        base=str(base),
        options={"push_to_hub": False},
        then="publish",
        repo_id="me/named-base",
        base_model=BASE_ID,
    )
    files = hub.repo("me/named-base").files()
    assert "gives the same logits" in found["verified"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists(), "publishing saved into the output directory"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE_ID
    assert json.loads(files["run_record.json"])["base"]["hub_id"] == BASE_ID
    card = files["README.md"].decode()
    assert f"base_model: {BASE_ID}" in card
    assert '"me/named-base"' in card
    loaded = client.do("load", repo_id="me/named-base")
    assert len(loaded[0]) == len(IDS[0])


def test_a_dry_run_of_a_trainer_uses_no_network(client: Client, hub: HubServer, base: Path, tmp_path: Path) -> None:
    """PEFT would ask the Hub about the base whenever it saves an adapter."""
    folder, options = str(tmp_path / "run"), {"push_to_hub": False}
    run = {"method": "dpo", "folder": folder, "base": str(base), "options": options, "recorded_base": BASE_ID}
    found = client.do("train", **run, then="publish", repo_id="me/dry", dry_run=True)
    assert hub.requests == []
    assert "adapter_model.safetensors" in found["files"]
    client.do("train", **run, then="save")
    assert hub.requests, "PEFT asks no longer: what keeps it from asking can go"


@pytest.mark.parametrize("method", ["dpo", "reward", "ppo"])
def test_a_base_of_the_hub_is_told_with_its_commit(method: str, client: Client, hub: HubServer, tmp_path: Path) -> None:
    folder, options = tmp_path / "run", {"push_to_hub": False}
    client.do("train", method=method, folder=str(folder), base=BASE_ID, options=options, then="save")
    base = json.loads((folder / "run_record.json").read_text(encoding="utf-8"))["base"]
    assert (base["hub_id"], base["revision"]) == (BASE_ID, hub.repo(BASE_ID).history()[0].sha)
    assert base["note"] is None


def test_no_repository_before_there_is_something_to_push(
    client: Client, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    options = {"hub_model_id": "me/never-made"}
    client.do("train", method="dpo", folder=str(tmp_path / "run"), base=str(base), options=options, then="make")
    assert "me/never-made" not in hub.store.repos
    assert written(hub) == []


def test_checkpoints_publish_the_adapter_alone(client: Client, hub: HubServer, base: Path, tmp_path: Path) -> None:
    options = {"hub_model_id": "me/every-save", "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    client.do("train", method="ppo", folder=str(tmp_path / "run"), base=str(base), options=options, then="nothing")
    repo = hub.repo("me/every-save")
    assert [commit.title for commit in repo.history()] == [
        "Training in progress, step 2",
        "Training in progress, step 1",
        "initial commit",
    ]
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert repo.files()["adapter_model.safetensors"] == (checkpoint / "adapter_model.safetensors").read_bytes()
    assert (checkpoint / "optimizer.pt").is_file()
    assert not [name for name in repo.files() if "/" in name or name.endswith((".bin", ".pt", ".pth"))]
    assert b"had not finished" in repo.files()["README.md"]


def test_strategy_end_pushes_when_the_model_is_saved(
    client: Client, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    options = {
        "hub_model_id": "named-by-its-owner",
        "hub_strategy": "end",
        "save_strategy": "steps",
        "save_steps": 1,
        "hub_revision": "trial",
        "hub_private_repo": False,
        "hub_token": OWNER_TOKEN,
    }
    client.do("train", method="dpo", folder=str(tmp_path / "run"), base=str(base), options=options, then="save")
    repo = hub.repo("me/named-by-its-owner")
    assert not repo.private
    assert list(repo.files("main")) == []
    assert [commit.title for commit in repo.history("trial")] == ["Model save", "initial commit"]


def test_hub_token_is_the_one_that_is_used(client: Client, hub: HubServer, base: Path, tmp_path: Path) -> None:
    options = {"hub_model_id": "other/by-hub-token", "hub_token": OTHER_TOKEN}
    client.do("train", method="dpo", folder=str(tmp_path / "run"), base=str(base), options=options)
    assert {request.token for request in hub.requests} <= {OTHER_TOKEN, None}
    assert "adapter_config.json" in hub.repo("other/by-hub-token").files()


def test_a_push_that_fails_says_where_the_model_is(client: Client, hub: HubServer, base: Path, tmp_path: Path) -> None:
    folder, options = str(tmp_path / "run"), {"hub_model_id": "other/not-mine"}
    failure = client.ask("train", method="dpo", folder=folder, base=str(base), options=options).failure
    assert failure is not None
    assert failure.kinds[0] == "PublishError"
    assert "(403)" in failure.message
    assert f"alignkit.publish('{folder}', 'other/not-mine')" in failure.message
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_trouble_while_training_does_not_end_it(client: Client, hub: HubServer, base: Path, tmp_path: Path) -> None:
    options = {"hub_model_id": "other/not-mine", "save_strategy": "steps", "save_steps": 1}
    reply = client.ask(
        "train", method="dpo", folder=str(tmp_path / "run"), base=str(base), options=options, then="nothing"
    )
    assert reply.failure is None
    assert "Not published" in reply.output
    assert "(403)" in reply.output


def test_without_a_token_the_run_does_not_start(client: Client, base: Path, tmp_path: Path) -> None:
    client.do("setenv", HF_TOKEN=None)
    try:
        failure = client.ask(
            "train", method="dpo", folder=str(tmp_path / "run"), base=str(base), options={"hub_model_id": "me/x"}
        ).failure
    finally:
        client.do("setenv", HF_TOKEN=OWNER_TOKEN)
    assert failure is not None
    assert failure.kinds[0] == "ConfigError"
    assert "push_to_hub=True, but there is no token" in failure.message
