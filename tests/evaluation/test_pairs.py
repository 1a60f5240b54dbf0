"""Held-out pairs without a trainer, against the evaluation of the installed TRL and against our own trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from alignkit.errors import ConfigError, DataError, ModelError, TrainingError
from alignkit.evaluation.judges import make_reward_source, source_rewards
from alignkit.evaluation.models import PolicyModel, load_evaluated, load_policy
from alignkit.evaluation.pairs import evaluate_preferences, score_preferences
from alignkit.evaluation.preference import summarize_rewards
from alignkit.models.reward_files import RewardModel
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.golden.trl_twin import RENAMED_OPTION_WARNINGS, build_ours, build_theirs, trl_module
from tests.model_factory import tiny_model
from tests.pair_factory import plain_model
from tests.tiny_preferences import QUIET, character_tokenizer, lora, randomise_adapter, text_rows

pytestmark = [pytest.mark.filterwarnings(pattern) for pattern in RENAMED_OPTION_WARNINGS]

ROWS = [row for row in text_rows(40, seed=3) if all(text.strip() for text in row.values())][:24]


def policy() -> PolicyModel:
    return load_policy(plain_model("llama"), character_tokenizer())


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_a_policy_scores_what_trl_evaluates(loss_type: str, tmp_path: Path) -> None:
    theirs = build_theirs(tmp_path, ROWS, per_device_eval_batch_size=12, loss_type=[loss_type], beta=0.3)
    expected = theirs.evaluate(Dataset.from_list(ROWS))
    model = theirs.model
    found = evaluate_preferences(model, ROWS, tokenizer=character_tokenizer(), loss_type=loss_type, beta=0.3)
    assert found.rows == 24
    assert found.ties == 0
    assert 0.2 < found.accuracy.value < 0.8
    assert found.accuracy.value == pytest.approx(expected["eval_rewards/accuracies"], abs=1e-6)
    assert found.margin.value == pytest.approx(expected["eval_rewards/margins"], rel=1e-4)
    assert found.loss == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_a_policy_scores_what_our_trainer_predicts(tmp_path: Path) -> None:
    trainer = build_ours(tmp_path, ROWS)
    predicted: Any = trainer.predict(Dataset.from_list(ROWS))
    scores = score_preferences(trainer.model, ROWS, tokenizer=character_tokenizer())
    for found, expected in zip((scores.chosen_rewards, scores.rejected_rewards), predicted.predictions, strict=True):
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)
    assert scores.row_ids == list(range(24))


def classifier() -> Any:
    base = tiny_model("llama")
    base.config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(base.config, dtype=torch.float32)
    model.load_state_dict(base.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    return model.eval()


def test_a_reward_model_scores_what_trl_evaluates(tmp_path: Path) -> None:
    trl = trl_module("trl")
    theirs = trl_module("trl.trainer.reward_trainer").RewardTrainer(
        classifier(),
        args=trl.RewardConfig(str(tmp_path), gradient_checkpointing=False, per_device_eval_batch_size=12, **QUIET),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=character_tokenizer(),
    )
    expected = theirs.evaluate(Dataset.from_list(ROWS))
    found = evaluate_preferences(theirs.model, ROWS, tokenizer=character_tokenizer())
    assert 0.2 < found.accuracy.value < 0.9
    assert found.accuracy.value == pytest.approx(expected["eval_accuracy"], abs=1e-6)
    assert found.margin.value == pytest.approx(expected["eval_margin"], rel=1e-4)
    assert found.loss == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_a_saved_reward_adapter_scores_what_its_trainer_predicts(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    trainer = RewardTrainer(
        str(tmp_path / "base"),
        args=RewardConfig(str(tmp_path / "run"), **QUIET),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=character_tokenizer(),
        peft_config=lora(task_type="SEQ_CLS"),
    )
    randomise_adapter(trainer.model, scale=0.3)
    trainer.save_model(str(tmp_path / "run"))
    prepared: Any = trainer.train_dataset
    expected = summarize_rewards(trainer, prepared)
    found = evaluate_preferences(load_evaluated(tmp_path / "run", dtype=torch.float32), ROWS)
    assert found.accuracy == expected.accuracy
    assert found.margin.value == pytest.approx(expected.margin.value, rel=1e-4)
    assert evaluate_preferences(str(tmp_path / "run"), ROWS, quiet=True).rows == 24
    # As a judge, it reads the texts as it was trained to: with EOS at their end.
    source = make_reward_source(str(tmp_path / "run"))
    scores = score_preferences(str(tmp_path / "run"), ROWS)
    rewards = source_rewards(source, [row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS])
    assert rewards == pytest.approx(scores.chosen_rewards.tolist(), rel=0.02, abs=0.02)
    assert scores.chosen_rewards.std() > 0.05


def test_nothing_is_left_behind_in_the_model() -> None:
    model = plain_model("llama").train()
    attention = model.get_base_model().config._attn_implementation
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    evaluate_preferences(model, ROWS[:4], tokenizer=character_tokenizer())
    assert model.get_base_model().config._attn_implementation == attention
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.training


def test_a_model_without_adapters_needs_a_reference() -> None:
    with pytest.raises(ModelError, match="pass reference="):
        evaluate_preferences(tiny_model("llama"), ROWS, tokenizer=character_tokenizer())
    other = tiny_model("llama", seed=5)
    found = evaluate_preferences(tiny_model("llama"), ROWS, tokenizer=character_tokenizer(), reference=other)
    assert found.ties == 0


def test_the_batches_change_nothing() -> None:
    ours = policy()
    whole, parts = (score_preferences(ours, ROWS, batch_tokens=tokens) for tokens in (4096, 40))
    torch.testing.assert_close(whole.chosen_rewards, parts.chosen_rewards, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_scored_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        evaluate_preferences(policy(), [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError):
        evaluate_preferences(policy(), [])
    with pytest.raises(ConfigError, match="loss on pairs"):
        evaluate_preferences(policy(), ROWS, loss_type="kto")
    with pytest.raises(ConfigError, match="reward model"):
        evaluate_preferences(RewardModel(classifier(), character_tokenizer()), ROWS, beta=0.2)
    with pytest.raises(ModelError):
        evaluate_preferences(str(tmp_path / "nowhere"), ROWS)


def test_diverged_weights_are_an_error() -> None:
    broken = classifier()
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        evaluate_preferences(RewardModel(broken, character_tokenizer()), ROWS)


def test_labels_with_names_are_no_reward() -> None:
    model = classifier()
    model.config.id2label = {0: "negative", 1: "positive"}
    with pytest.raises(ConfigError, match="negative"):
        evaluate_preferences(RewardModel(model, character_tokenizer()), ROWS)
