"""What `alignkit.publish` sends: everything that a reader needs, nothing else, and it is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.hub.conftest import BASE_ID, logits_of, snapshot
from tests.hub_server import HubServer
from tests.hub_server.client import Client

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
    assert list(repo.files()) == PUBLISHED
    assert repo.files()["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert "gives the same logits" in found["verified"]
    assert [request.path.split("/")[1] for request in hub.uploads()] == [{"lfs": "objects", "xet": "v1"}[path]]
    assert (repo.resolve("main").files["adapter_model.safetensors"].xet_hash is not None) == (path == "xet")
    loaded = torch.tensor(clients(path).do("load", repo_id=repo_id))
    assert torch.allclose(loaded, logits_of(base, adapter), rtol=1e-5, atol=1e-6)
    assert snapshot(adapter) == before
