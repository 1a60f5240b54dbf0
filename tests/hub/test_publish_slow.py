"""Publishing from two processes, and from a run on the demonstration model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.models.adapters import peft_warnings
from alignkit.models.demo import DEMO_HUB_ID, demo_model_path
from tests.hub.conftest import OWNER_TOKEN
from tests.hub_server import HubServer, two_processes
from tests.hub_server.client import ROOT, Client, inherited_environment
from tests.tiny_preferences import lora, randomise_adapter

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("owner", ["me", "other"])
def test_two_processes_publish_once_and_both_know(owner: str, hub: HubServer, base: Path, tmp_path: Path) -> None:
    repo_id = f"{owner}/two-processes"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", two_processes.__name__, str(tmp_path), str(base), repo_id]
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": OWNER_TOKEN, "HF_HOME": str(tmp_path / "home")}
    environment = {**inherited_environment(), **settings, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"outcome-{rank}.json").read_text()) for rank in range(2))
    if owner == "me":
        assert first == second
        assert first["commit"] == hub.repo(repo_id).resolve("main").sha
        assert len(hub.repo(repo_id).history()) == 2
        assert "gives the same logits" in first["verified"]
    else:
        assert "(403)" in first["error"]
        assert second["error"] == f"the first process could not publish: {first['error']}"


def test_an_adapter_of_the_demonstration_model(
    clients: Callable[[str], Client], hub: HubServer, tmp_path: Path
) -> None:
    path = demo_model_path()
    folder = tmp_path / "run"
    with peft_warnings():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora())
    randomise_adapter(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    found = clients("xet").do("publish", folder=str(folder), repo_id="me/demo-adapter")
    assert f"the adapter on {DEMO_HUB_ID}, loaded from them, gives the same logits" in found["verified"]
    files = hub.repo("me/demo-adapter").files()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == DEMO_HUB_ID
    assert "chat_template.jinja" in files
    assert f"base_model: {DEMO_HUB_ID}".encode() in files["README.md"]
