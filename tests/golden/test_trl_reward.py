"""Our reward model against the installed TRL's: same weights, same head, same rows, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.golden.trl_twin import RENAMED_OPTION_WARNINGS, gradients, trl_module
from tests.model_factory import tiny_model
from tests.tiny_preferences import (
    QUIET,
    adapter_weights,
    assert_close_tensors,
    character_tokenizer,
    lora,
    randomise_adapter,
    text_rows,
)

pytestmark = [pytest.mark.filterwarnings(pattern) for pattern in RENAMED_OPTION_WARNINGS]

STEPS = 3
RUN: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_steps": STEPS,
    "logging_steps": 1,
    "seed": 11,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-4,  # keeps rounding noise from becoming whole steps
}
COMPARED = ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")


def rows(count: int, seed: int = 0, *, margins: bool = True) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = list(text_rows(count, seed=seed))
    for i, row in enumerate(made):
        if margins:
            row["margin"] = 0.2 * (i % 3)
    return made


def classifier() -> PreTrainedModel:
    """Transformers' sequence classifier with the tiny causal model's weights."""
    base = tiny_model("llama")
    base.config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(base.config, dtype=torch.float32)
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert result.missing_keys == ["score.weight"]
    assert result.unexpected_keys == ["lm_head.weight"]
    return model


def twins(folder: Path, data: list[dict[str, Any]], **options: Any) -> tuple[Any, RewardTrainer]:
    """TRL's trainer and ours; adapters and heads are equal, and away from zero."""
    trl = trl_module("trl")
    settings = {**RUN, **QUIET, **options}
    theirs = trl_module("trl.trainer.reward_trainer").RewardTrainer(
        classifier(),
        args=trl.RewardConfig(str(folder / "theirs"), gradient_checkpointing=False, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=character_tokenizer(),
        peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    ours = RewardTrainer(
        tiny_model("llama"),
        args=RewardConfig(str(folder / "ours"), activation_checkpointing=False, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=character_tokenizer(),
        peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    for trainer in (theirs, ours):
        randomise_adapter(trainer.model, scale=0.2)
    expected, found = adapter_weights(theirs.model), adapter_weights(ours.model)
    assert found.keys() == expected.keys()
    assert any(".score." in name for name in found)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    return theirs, ours


@pytest.mark.parametrize("margins", [False, True], ids=["plain", "margin column"])
@pytest.mark.parametrize("center", [None, 0.05])
def test_one_batch(center, margins, tmp_path):
    theirs, ours = twins(tmp_path, rows(7, margins=margins), center_rewards_coefficient=center)
    their_rows, our_rows = list(theirs.train_dataset), list(ours.train_dataset)
    for theirs_row, row in zip(their_rows, our_rows, strict=True):  # their sequences hold the prompt
        assert theirs_row["chosen_ids"] == row["prompt_ids"] + row["chosen_ids"]
        assert theirs_row["rejected_ids"] == row["prompt_ids"] + row["rejected_ids"]
    for trainer in (theirs, ours):
        trainer.model.train()
    expected = theirs.compute_loss(theirs.model, theirs.data_collator(their_rows))
    found = ours.compute_loss(ours.model, ours.data_collator(our_rows))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert_close_tensors(gradients(ours.model, found), gradients(theirs.model, expected), rtol=1e-4)


def test_three_steps_and_an_evaluation(tmp_path):
    theirs, ours = twins(tmp_path, rows(16), center_rewards_coefficient=0.01)
    held_out = Dataset.from_list(rows(8, seed=1))
    for trainer in (theirs, ours):
        trainer.train()
    expected, found = theirs.evaluate(held_out), ours.evaluate(held_out)
    logs, expected_logs = ([entry for entry in t.state.log_history if "loss" in entry] for t in (ours, theirs))
    assert len(logs) == len(expected_logs) == STEPS
    for entry, wanted in zip(logs, expected_logs, strict=True):
        assert {name: entry[name] for name in COMPARED} == pytest.approx(
            {name: wanted[name] for name in COMPARED}, rel=1e-4, abs=1e-5
        )
    names = [f"eval_{name}" for name in COMPARED if name != "grad_norm"]
    assert {name: found[name] for name in names} == pytest.approx(
        {name: expected[name] for name in names}, rel=1e-4, abs=1e-5
    )
    weights = dict(adapter_weights(ours.model))
    assert_close_tensors(weights, dict(adapter_weights(theirs.model)), rtol=1e-4)
    randomise_adapter(theirs.model, scale=0.2)  # back to the start
    assert all((weights[name] - start).abs().max() > 1e-5 for name, start in adapter_weights(theirs.model).items())


def test_their_loader_reads_our_adapter(tmp_path):
    """What we save goes into their model, weight by weight."""
    theirs, ours = twins(tmp_path, rows(8))
    ours.train()
    ours.save_model()
    theirs.model.load_adapter(str(tmp_path / "ours"), "default")
    assert_close_tensors(dict(adapter_weights(theirs.model)), dict(adapter_weights(ours.model)), rtol=0)
