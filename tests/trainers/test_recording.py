"""The record that a trainer keeps: of runs that are resumed, and of trainers that train again."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from alignkit.hub.card import render_card
from alignkit.hub.record import RunRecord
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.model_factory import tiny_model
from tests.pair_factory import lora_config
from tests.tiny_preferences import character_tokenizer, text_rows

ROWS = [row for row in text_rows(30, seed=3) if all(text.strip() for text in row.values())]


def make_trainer(folder: Path) -> DPOTrainer:
    args = DPOConfig(
        str(folder),
        max_steps=4,
        save_strategy="steps",
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        report_to="none",
        use_cpu=True,
    )
    return DPOTrainer(
        model=tiny_model("llama"),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=character_tokenizer(),
        peft_config=lora_config(),
    )


@pytest.fixture
def trainer(tmp_path: Path) -> DPOTrainer:
    made = make_trainer(tmp_path)
    made.train()
    return made


def test_a_resumed_run_says_from_where_it_went_on(trainer: DPOTrainer, tmp_path: Path) -> None:
    assert RunRecord.load(tmp_path).usage["resumed_from_step"] is None
    make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    usage = RunRecord.load(tmp_path).usage
    assert (usage["steps"], usage["resumed_from_step"]) == (4, 3)
    assert "4 optimizer steps, resumed after 3; the last 1 in" in render_card(RunRecord.load(tmp_path))


def test_what_was_measured_of_an_earlier_training_is_not_claimed_of_the_next(
    trainer: DPOTrainer, tmp_path: Path
) -> None:
    trainer.record.add_evaluation("held-out preferences", {"accuracy": 0.9}, rows=9)
    trainer.record.samples = [{"prompt": "a", "before": None, "after": "b"}]
    trainer.train()
    found = RunRecord.load(tmp_path)
    assert (found.evaluations, found.samples) == ([], [])
    assert found.finished is not None
    assert "trained more than once" in found.notes[0]


def test_what_was_measured_before_training_stays(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.record.add_evaluation("safety, before", {"refusals": 0.1}, rows=9)
    trainer.train()
    assert [each["name"] for each in RunRecord.load(tmp_path).evaluations] == ["safety, before"]
    assert RunRecord.load(tmp_path).notes == []
