"""What a resume, and the end of a run, load into a model whose adapters bear any names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from alignkit.checkpoint.manifest import MANIFEST
from alignkit.errors import CheckpointError
from alignkit.models.adapters import peft_warnings
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.crash.compare import unequal
from tests.model_factory import tiny_model
from tests.tiny_preferences import QUIET, character_tokenizer, lora, randomise_adapter, token_rows

WEIGHTS = "adapter_model.safetensors"
STILL = {"weights_only_resume": True, "learning_rate": 0.0}  # what was loaded is what comes out


def run(folder: Path, name: str, adapter: dict[str, Any] | None = None, **options: Any) -> DPOTrainer:
    """Two steps of an adapter with this name, and one for the reference beside it."""
    with peft_warnings():
        model = get_peft_model(tiny_model("llama"), lora(**adapter or {}), adapter_name=name)
    randomise_adapter(model)
    return DPOTrainer(
        model,
        args=DPOConfig(
            str(folder),
            **{**QUIET, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1, **options},
        ),
        train_dataset=token_rows(16),
        eval_dataset=token_rows(4, seed=5),
        processing_class=character_tokenizer(),
    )


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / ("" if name == "default" else name) / WEIGHTS)


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the adapter "default", and "reference" in a folder of its own."""
    folder = tmp_path_factory.mktemp("synced")
    run(folder, "default", sync_ref_model=True, ref_model_sync_steps=1).train()
    assert (folder / "checkpoint-1" / "reference" / WEIGHTS).is_file()
    return folder / "checkpoint-1"


def test_weights_alone_of_another_adapter_are_refused(synced: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"holds the adapters \['default', 'reference'\].* trains 'mine'"):
        run(tmp_path, "mine", **STILL).train(str(synced))


@pytest.mark.parametrize(("saved", "now"), [("q_proj", "all-linear"), ("all-linear", "q_proj")])
def test_weights_alone_of_an_adapter_on_other_layers_are_refused(saved: str, now: str, tmp_path: Path):
    layers = {"q_proj": ["q_proj"], "all-linear": "all-linear"}
    run(tmp_path / "other", "default", {"target_modules": layers[saved]}).train()
    with pytest.raises(CheckpointError, match=r"holds other weights than the adapter 'default'.*_proj"):
        run(tmp_path / "run", "default", {"target_modules": layers[now]}, **STILL).train(
            str(tmp_path / "other" / "checkpoint-1")
        )


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_single_adapter_is_taken_for_the_one_in_training(name: str, synced: Path, tmp_path: Path):
    single = Path(shutil.copytree(synced, tmp_path / "single"))
    shutil.rmtree(single / "reference")
    (single / MANIFEST).unlink()
    trainer = run(tmp_path / "run", name, **STILL)
    known = set(trainer.model.peft_config)
    trainer.train(str(single))
    assert set(trainer.model.peft_config) == known
    assert list(unequal(weights(tmp_path / "run" / "checkpoint-2", name), weights(single, "default"))) == []


def test_adapters_that_the_model_lacks_are_let_be(synced: Path, tmp_path: Path):
    further = Path(shutil.copytree(synced, tmp_path / "further"))
    shutil.copytree(further / "reference", further / "strange")
    (further / MANIFEST).unlink()
    trainer = run(tmp_path / "run", "default", sync_ref_model=True, ref_model_sync_steps=100, **STILL)
    trainer.train(str(further))
    assert set(trainer.model.peft_config) == {"default", "reference"}
    for name in ("default", "reference"):
        assert list(unequal(weights(tmp_path / "run" / "checkpoint-2", name), weights(synced, name))) == [], name


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_model_is_loaded(name: str, tmp_path: Path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": False}
    trainer = run(tmp_path, name, metric_for_best_model="loss", **best)
    trainer.train()
    assert trainer.state.best_global_step == 1
    trainer.save_model(str(tmp_path / "end"))
    found, first, last = (weights(tmp_path / folder, name) for folder in ("end", "checkpoint-1", "checkpoint-2"))
    assert list(unequal(found, first)) == []
    assert list(unequal(found, last)) != []
