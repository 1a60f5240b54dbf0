"""Good folders of every kind, to be spoiled in copies, and a place outside that must stay as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from alignkit.models.adapters import add_adapter
from tests.bad_input import save_models
from tests.hostile.harness import MARKER, edit
from tests.model_factory import tiny_model
from tests.rollout.reward_samples import tiny_classifier
from tests.tiny_preferences import character_tokenizer, lora, randomise_adapter

SECRET = "the neighbour's secret"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved: `base` and `classifier`, whole models, with tokenizers; `policy` and `reward`, adapters on `base`."""
    folder = save_models(tmp_path_factory.mktemp("good"))
    classifier = tiny_classifier("llama")
    classifier.save_pretrained(folder / "classifier")
    character_tokenizer().save_pretrained(folder / "classifier")
    base = tiny_model("llama")
    adapted = add_adapter(base, lora())
    randomise_adapter(adapted)
    adapted.save_pretrained(str(folder / "adapter"))
    character_tokenizer().save_pretrained(folder / "adapter")
    edit(folder / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder / "base"))
    sharded = tiny_model("llama")
    sharded.save_pretrained(folder / "sharded", max_shard_size="40KB")
    character_tokenizer().save_pretrained(folder / "sharded")
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A file of somebody else, which no loader may change."""
    path = tmp_path / "outside" / "secret.json"
    path.parent.mkdir()
    path.write_text(f'"{SECRET}"')
    yield path
    assert path.read_text() == f'"{SECRET}"'
    assert [entry.name for entry in path.parent.iterdir()] == ["secret.json"]


@pytest.fixture(autouse=True)
def _no_marker() -> Iterator[None]:
    yield
    if MARKER.exists():
        MARKER.rmdir()
        pytest.fail("a hostile pickle was run")
