"""What `alignkit.publish` sends: everything that a reader needs, nothing else, and it is what was trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.models.demo import DEMO_HUB_ID
from tests.hub.conftest import BASE_ID, RARE_BASE_ID, logits_of, snapshot
from tests.hub_server import HubServer
from tests.hub_server.client import Client
from tests.hub_server.store import Blob

PUBLISHED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("path", ["lfs", "xet"])
def test_a_published_adapter_loads_by_its_name_and_computes_the_same(
    path: str, clients: Callable[[str], Client], hub: HubServer, base: Path, make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter({"lfs": 11, "xet": 12}[path])
    before = snapshot(adapter)
    repo_id = f"me/loads-{path}"
    found = clients(path).do("publish", folder=str(adapter), repo_id=repo_id, base_model=BASE_ID)
    repo = hub.repo(repo_id)
    assert found["url"] == f"{hub.url}/{repo_id}"
    assert found["commit"] == repo.resolve("main").sha
    assert found["pull_request"] is None
    assert found["private"] is True
    assert repo.private
    assert list(repo.files()) == found["files"] == PUBLISHED
    assert repo.files()["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert "gives the same logits" in found["verified"]
    assert [request.path.split("/")[1] for request in hub.uploads()] == [{"lfs": "objects", "xet": "v1"}[path]]
    assert (repo.resolve("main").files["adapter_model.safetensors"].xet_hash is not None) == (path == "xet")
    loaded = torch.tensor(clients(path).do("load", repo_id=repo_id))
    assert torch.allclose(loaded, logits_of(base, adapter), rtol=1e-5, atol=1e-6)
    assert snapshot(adapter) == before


@pytest.mark.parametrize("path", ["lfs", "xet"])
def test_publishing_again_sends_nothing_and_makes_no_commit(
    path: str, clients: Callable[[str], Client], hub: HubServer, make_adapter: Callable[..., Path]
) -> None:
    adapter, repo_id = make_adapter({"lfs": 13, "xet": 14}[path]), f"me/again-{path}"
    first = clients(path).do("publish", folder=str(adapter), repo_id=repo_id)
    assert len(hub.uploads()) == 1
    second = clients(path).do("publish", folder=str(adapter), repo_id=repo_id)
    assert second["commit"] == first["commit"]
    assert len(hub.uploads()) == 1
    assert len(hub.repo(repo_id).history()) == 2


def test_a_large_file_goes_up_in_parts(client: Client, hub: HubServer, make_adapter: Callable[..., Path]) -> None:
    adapter = make_adapter(15)
    hub.multipart_bytes = 10_000
    try:
        client.do("publish", folder=str(adapter), repo_id="me/in-parts")
    finally:
        hub.multipart_bytes = None
    assert len(hub.uploads()) == -(-(adapter / "adapter_model.safetensors").stat().st_size // 10_000) > 1
    weights = hub.repo("me/in-parts").files()["adapter_model.safetensors"]
    assert weights == (adapter / "adapter_model.safetensors").read_bytes()


def test_a_branch_is_made_and_the_main_one_stays(client: Client, hub: HubServer, adapter: Path) -> None:
    found = client.do("publish", folder=str(adapter), repo_id="me/branch", branch="beta/one")
    repo = hub.repo("me/branch")
    assert list(repo.files("beta/one")) == PUBLISHED
    assert list(repo.files("main")) == []
    assert found["commit"] == repo.resolve("beta/one").sha
    client.do("publish", folder=str(adapter), repo_id="me/branch", branch="beta/one")
    assert len(repo.history("beta/one")) == 2


@pytest.mark.parametrize("path", ["lfs", "xet"])
def test_a_pull_request_to_somebody_elses_repository(
    path: str, clients: Callable[[str], Client], hub: HubServer, make_adapter: Callable[..., Path]
) -> None:
    adapter, repo_id = make_adapter({"lfs": 16, "xet": 17}[path]), f"other/open-{path}"
    repo = hub.add_repo(repo_id)
    options = {"folder": str(adapter), "repo_id": repo_id, "create_pr": True, "commit_message": "My adapter"}
    found = clients(path).do("publish", **options)
    assert found["pull_request"] == f"{hub.url}/{repo_id}/discussions/1"
    assert list(repo.files("refs/pr/1")) == PUBLISHED
    assert found["commit"] == repo.resolve("refs/pr/1").sha
    assert list(repo.files("main")) == []
    assert [each.title for each in repo.discussions] == ["My adapter"]
    again = clients(path).do("publish", **options)
    assert (again["pull_request"], again["commit"]) == (found["pull_request"], found["commit"])
    assert len(repo.discussions) == 1


def test_an_existing_repository_keeps_its_visibility_and_its_files(
    client: Client, hub: HubServer, adapter: Path
) -> None:
    repo = hub.add_repo("me/existing")
    files = {"notes.md": b"mine", "README.md": b"---\nlicense: mit\n---\n# Mine\n\nWritten by hand, with care.\n"}
    blobs = {name: Blob(data) for name, data in files.items()}
    repo.commit("main", repo.resolve("main").sha, "by hand", "", blobs)
    reply = client.ask("publish", folder=str(adapter), repo_id="me/existing")
    assert reply.failure is None
    assert reply.result["private"] is False
    assert not repo.private
    assert "stays public" in reply.output
    assert "stays as it is" in reply.output
    assert {name: repo.files()[name] for name in files} == files
    assert set(repo.files()) == {*PUBLISHED, "notes.md"}
    assert "README.md" not in reply.result["files"]


def test_a_card_that_a_person_wrote_on_a_branch_stays_too(client: Client, hub: HubServer, adapter: Path) -> None:
    repo, text = hub.add_repo("me/card-on-a-branch"), b"---\nlicense: mit\n---\n# Mine\n\nFour evenings of work.\n"
    repo.refs["beta"] = repo.refs["main"]
    repo.commit(
        "beta", repo.resolve("beta").sha, "by hand", "", {"README.md": Blob(text), "a/optimizer.pt": Blob(b"x")}
    )
    repo.commit("main", repo.resolve("main").sha, "by hand", "", {"a/optimizer.pt": Blob(b"x")})
    reply = client.ask("publish", folder=str(adapter), repo_id="me/card-on-a-branch", branch="beta")
    assert reply.failure is None, reply
    assert repo.files("beta")["README.md"] == text
    assert "holds a/optimizer.pt from an earlier upload" in reply.output


@pytest.mark.parametrize(("is_private", "asked"), [(True, False), (False, True)])
def test_the_visibility_of_an_existing_repository_is_not_changed_in_passing(
    is_private: bool, asked: bool, client: Client, hub: HubServer, adapter: Path
) -> None:
    repo = hub.add_repo(f"me/visible-{is_private}", private=is_private)
    failure = client.ask("publish", folder=str(adapter), repo_id=repo.repo_id, private=asked).failure
    assert failure is not None
    assert failure.kinds[0] == "ConfigError"
    assert f"exists and is {'private' if is_private else 'public'}" in failure.message
    assert len(repo.history()) == 1


def test_a_dry_run_shows_everything_and_uses_no_network(client: Client, hub: HubServer, adapter: Path) -> None:
    reply = client.ask("publish", folder=str(adapter), repo_id="me/dry", dry_run=True)
    assert reply.failure is None
    assert reply.result["commit"] is None
    assert hub.requests == []
    assert "me/dry" not in hub.store.repos
    for name in PUBLISHED:
        assert name in reply.output
    weights = adapter / "adapter_model.safetensors"
    assert f"{weights.stat().st_size:,} bytes" in reply.output
    assert _sha256(weights) in reply.output
    assert "library_name: peft" in reply.output
    assert reply.result["files"] == PUBLISHED


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_card_that_a_person_wrote_goes_up_as_it_is(client: Client, hub: HubServer, adapter: Path) -> None:
    text = "---\nlicense: mit\n---\n# Mine\n\nFour evenings of work.\n"
    (adapter / "README.md").write_text(text)
    client.do("publish", folder=str(adapter), repo_id="me/written-card")
    assert hub.repo("me/written-card").files()["README.md"].decode() == text


def test_a_card_with_broken_metadata_is_an_error(client: Client, hub: HubServer, adapter: Path) -> None:
    (adapter / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n\nText.\n")
    failure = client.ask("publish", folder=str(adapter), repo_id="me/broken-card").failure
    assert failure is not None
    assert failure.kinds[0] == "ConfigError"
    assert "metadata at the top of README.md" in failure.message
    assert hub.requests == []


@pytest.mark.parametrize(
    ("recorded", "name", "revision"),
    [
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B", None),
        ("/home/jane/models/my-base", "my-base", None),
        ("C:\\Users\\jane\\my-base", "my-base", None),
        ("/root/.cache/alignkit/SmolLM2-135M-Instruct-demo-0.1.2-1", DEMO_HUB_ID, None),
        (f"/x/hub/models--a--b/snapshots/{'0' * 40}", "a/b", "0" * 40),
    ],
)
def test_a_base_is_named_without_its_path(
    recorded: str, name: str, revision: str | None, client: Client, hub: HubServer, adapter: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": recorded}))
    repo_id = f"me/base-{abs(hash(recorded))}"
    found = client.do("publish", folder=str(adapter), repo_id=repo_id)
    published = json.loads(hub.repo(repo_id).files()["adapter_config.json"])
    assert published["base_model_name_or_path"] == name
    assert published["revision"] == revision
    if name != DEMO_HUB_ID:  # which may lie on this machine
        assert "logits were not compared: the base" in found["verified"]


def test_paths_of_another_machine(client: Client, hub: HubServer, adapter: Path) -> None:
    """Those that libraries note are left out; any other in a configuration is refused."""
    file = adapter / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "special_tokens_map_file": "/scratch/jane/m/special_tokens_map.json"}))
    client.do("publish", folder=str(adapter), repo_id="me/elsewhere")
    published = json.loads(hub.repo("me/elsewhere").files()["tokenizer_config.json"])
    assert published == config
    file.write_text(json.dumps({**config, "something": "/scratch/jane/m/file.json"}))
    failure = client.ask("publish", folder=str(adapter), repo_id="me/elsewhere-2").failure
    assert failure is not None
    assert "tokenizer_config.json, line 1: absolute path: something" in failure.message
    assert "me/elsewhere-2" not in hub.store.repos


def test_logits_are_compared_where_the_base_is_and_nothing_is_downloaded_for_it(
    client: Client, hub: HubServer, adapter: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": RARE_BASE_ID}))
    found = client.do("publish", folder=str(adapter), repo_id="me/of-a-rare-base")
    assert f"logits were not compared: the base {RARE_BASE_ID} is not on this machine" in found["verified"]
    assert not [request for request in hub.requests if RARE_BASE_ID in request.path]
    client.do("load", repo_id="me/of-a-rare-base")
    found = client.do("publish", folder=str(adapter), repo_id="me/of-a-rare-base")
    assert f"the adapter on {RARE_BASE_ID}, loaded from them, gives the same logits" in found["verified"]


def test_a_whole_model_and_a_classifier(client: Client, hub: HubServer, base: Path, tmp_path: Path) -> None:
    found = client.do("publish", folder=str(base), repo_id="me/whole")
    assert "the model, loaded from them, gives the same logits" in found["verified"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(hub.repo("me/whole").files())
    folder = tmp_path / "classifier"
    config = AutoModelForCausalLM.from_pretrained(base).config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    found = client.do("publish", folder=str(folder), repo_id="me/classifier")
    assert "gives the same logits" in found["verified"]


def test_shards_go_up_and_a_missing_one_is_an_error(client: Client, hub: HubServer, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    client.do("publish", folder=str(folder), repo_id="me/sharded")
    assert {shard.name for shard in shards} < set(hub.repo("me/sharded").files())
    shards[0].unlink()
    failure = client.ask("publish", folder=str(folder), repo_id="me/no-shard").failure
    assert failure is not None
    assert f"names files that are missing: {shards[0].name}" in failure.message
    assert "me/no-shard" not in hub.store.repos


def _truncate(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def _not_finite(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights[next(iter(weights))].view(-1)[0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _only_checkpoints(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    (folder / "training_args.bin").unlink()


def _break_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut weights": (_truncate, "adapter_model.safetensors cannot be read"),
    "weights that are not finite": (_not_finite, "numbers that are not finite"),
    "a pickle": (_pickled, "Only safetensors are published"),
    "checkpoints alone": (_only_checkpoints, "checkpoint-3'"),
    "a broken config": (_break_config, "is not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_before_anything_is_sent(
    name: str, client: Client, hub: HubServer, adapter: Path
) -> None:
    spoil, said = BROKEN[name]
    spoil(adapter)
    failure = client.ask("publish", folder=str(adapter), repo_id="me/broken").failure
    assert failure is not None
    assert "ModelError" in failure.kinds
    assert said in failure.message
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"repo_id": "no-owner"}, "must be 'owner/name'"),
        ({"repo_id": "me/a b"}, "is no name for a repository"),
        ({"repo_id": "me/x", "branch": "beta", "create_pr": True}, "Leave one of the two out"),
        ({"repo_id": "me/x", "base_model": "/models/base"}, "must be a name on the Hub"),
        ({"repo_id": "me/x", "folder": "/nowhere"}, "is no folder"),
    ],
)
def test_wrong_arguments(arguments: dict, said: str, client: Client, hub: HubServer, adapter: Path) -> None:
    failure = client.ask("publish", **{"folder": str(adapter), **arguments}).failure
    assert failure is not None
    assert said in failure.message
    assert hub.requests == []
