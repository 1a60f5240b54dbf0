"""A Hub on loopback for all tests of this folder, two clients of it, and adapters to publish."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from alignkit.models.adapters import peft_warnings
from tests.hub_server import HubServer
from tests.hub_server.client import Client
from tests.hub_server.store import Blob
from tests.hub_server.worker import IDS
from tests.model_factory import tiny_model
from tests.tiny_preferences import character_tokenizer, lora, randomise_adapter

OWNER_TOKEN = "hf_" + "OwnerToken" * 3 + "1234"
READ_TOKEN = "hf_" + "ReadOnlyTk" * 3 + "1234"
OTHER_TOKEN = "hf_" + "OtherToken" * 3 + "1234"
BASE_ID = "lab/tiny-base"
RARE_BASE_ID = "lab/rarely-used-base"  # the same, under a name that no other test brings into a client's cache


@pytest.fixture(scope="session")
def server(base: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add_user("me", OWNER_TOKEN)
        hub.add_user("me", READ_TOKEN, can_write=False)
        hub.add_user("other", OTHER_TOKEN)
        files = {path.name: path.read_bytes() for path in base.iterdir()}
        blobs = {name: Blob(data, is_lfs=name.endswith(".safetensors")) for name, data in files.items()}
        hub.store.objects.update({blob.sha256: blob.data for blob in blobs.values() if blob.is_lfs})
        for name in (BASE_ID, RARE_BASE_ID):
            hub.add_repo(name).commit("main", None, "the base", "", blobs)
        yield hub


@pytest.fixture
def hub(server: HubServer) -> Iterator[HubServer]:
    """The server with an empty record of requests."""
    server.requests.clear()
    assert not server.faults
    yield server
    assert server.crashes == []


@pytest.fixture(scope="session")
def clients(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Client]]:
    """Client processes by upload path, "lfs" or "xet", each started when it is first wanted."""
    started: dict[str, Client] = {}

    def get(kind: str) -> Client:
        if kind not in started:
            home = tmp_path_factory.mktemp(f"client-{kind}") / "home"
            started[kind] = Client(server.url, OWNER_TOKEN, home, xet=kind == "xet")
        return started[kind]

    yield get
    for client in started.values():
        client.close()


@pytest.fixture(scope="session")
def client(clients: Callable[[str], Client]) -> Client:
    """The client that uploads over LFS."""
    return clients("lfs")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its tokenizer, in a folder whose name must not go up with it."""
    folder = tmp_path_factory.mktemp("private-folder") / "tiny-base"
    tiny_model("llama").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_adapter(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make an output folder as a run leaves it: an adapter, and much that must stay here."""

    def make(seed: int, name: str = "run", **config: object) -> Path:
        folder = tmp_path / name
        with peft_warnings():
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(**config))
        randomise_adapter(model, seed=seed)
        model.save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)
        for private in ("training_args.bin", "optimizer.pt", "rollouts.jsonl", "trainer_state.json", "notes.txt"):
            (folder / private).write_text("stays here")
        for inner in ("checkpoint-3", "reward", "value", "reference", "runs"):
            (folder / inner).mkdir()
            shutil.copy(folder / "adapter_model.safetensors", folder / inner)
            (folder / inner / "training_args.bin").write_text("stays here")
        return folder

    return make


@pytest.fixture
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(1)


def logits_of(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of a local adapter, by plain peft."""
    with peft_warnings():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every byte below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
