"""Answers of the policy and of its reference, and a trainer that is as it was afterwards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from alignkit.errors import DataError, ModelError
from alignkit.evaluation.generation import compare_answers, greedy_answers
from alignkit.evaluation.preference import summarize_preferences
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.model_factory import tiny_model
from tests.models.conftest import character_tokenizer

PROMPTS = [[40, 41, 42, 43], [50], [60, 61]]


def rows(count: int) -> Dataset:
    draw = random.Random(0)
    ids = lambda longest: [draw.randrange(33, 97) for _ in range(draw.randint(2, longest))]  # noqa: E731
    return Dataset.from_list(
        [{"prompt_ids": ids(6), "chosen_ids": ids(7), "rejected_ids": ids(7)} for _ in range(count)]
    )


def trainer(folder: Path, model: Any = None, **options: Any) -> DPOTrainer:
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"learning_rate": 5e-2, "bf16": False, "max_steps": 4, "logging_steps": 1, "report_to": [], **options}
    return DPOTrainer(
        tiny_model("llama") if model is None else model,
        args=DPOConfig(str(folder), save_strategy="no", per_device_train_batch_size=4, **settings),
        train_dataset=rows(8),
        eval_dataset=rows(6),
        processing_class=character_tokenizer(eos_token="</s>", pad_token="<pad>"),
        peft_config=peft_config if model is None else None,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    made = trainer(tmp_path_factory.mktemp("run"))
    made.train()
    return made


def test_answers_are_greedy_and_batching_does_not_change_them(trained: DPOTrainer) -> None:
    together = greedy_answers(trained, PROMPTS, max_new_tokens=8)
    alone = [greedy_answers(trained, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert together == alone
    model, tokenizer = trained.bundle.model.eval(), trained.processing_class
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    assert together[0] == tokenizer.decode(ids[len(PROMPTS[0]) :], skip_special_tokens=True).strip()


def test_the_reference_answers_without_the_adapter(trained: DPOTrainer) -> None:
    answers = compare_answers(trained, PROMPTS, max_new_tokens=8)
    untrained = compare_answers(trainer(Path(trained.args.output_dir)), PROMPTS, max_new_tokens=8)
    assert [answer.reference for answer in answers] == [answer.policy for answer in untrained]
    assert [answer.reference for answer in untrained] == [answer.policy for answer in untrained]
    assert any(answer.policy != answer.reference for answer in answers)
    assert answers[1].prompt == trained.processing_class.decode([50])


@pytest.mark.parametrize("training", [True, False])
def test_modes_gradients_and_generators_stay(trained: DPOTrainer, training: bool) -> None:
    model = trained.bundle.model.train(training)
    odd_one = next(module for module in model.modules() if not list(module.children()))
    odd_one.train(not training)
    modes = [module.training for module in model.modules()]
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    generator = torch.get_rng_state()
    compare_answers(trained, PROMPTS, max_new_tokens=4)
    assert [module.training for module in model.modules()] == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == gradients
    assert any(gradients.values())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_separate_reference_answers_for_a_model_trained_whole(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny_model("llama"))
    before = compare_answers(made, PROMPTS, max_new_tokens=8)
    made.train()
    after = compare_answers(made, PROMPTS, max_new_tokens=8)
    assert [answer.reference for answer in after] == [answer.policy for answer in before]
    assert any(answer.policy != answer.reference for answer in after)


def test_without_a_reference_the_policy_answers_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny_model("llama"), loss_type="simpo")
    assert [answer.reference for answer in compare_answers(made, PROMPTS, max_new_tokens=4)] == [None] * 3
    with pytest.raises(ModelError, match="reference"):
        greedy_answers(made, PROMPTS, role="reference")


def test_a_prompt_without_tokens_is_refused(trained: DPOTrainer) -> None:
    with pytest.raises(DataError, match="prompt 1"):
        greedy_answers(trained, [[40], []])


def test_training_goes_on_after_answers(tmp_path: Path) -> None:
    with_answers, without = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    compare_answers(with_answers, PROMPTS, max_new_tokens=4)
    with_answers.train()
    without.train()
    assert with_answers.state.log_history[0]["loss"] == without.state.log_history[0]["loss"]
    assert with_answers.state.log_history[-2]["loss"] == without.state.log_history[-2]["loss"]


def test_a_summary_of_a_trainer_agrees_with_its_own_evaluation(trained: DPOTrainer) -> None:
    summary = summarize_preferences(trained, trained.eval_dataset)
    metrics = trained.evaluate()
    lengths = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows(6)]
    shorter = sum((chosen < rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths) / 6
    assert summary.loss == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert summary.accuracy.value == pytest.approx(metrics["eval_rewards/accuracies"])
    assert summary.margin.value == pytest.approx(metrics["eval_rewards/margins"], rel=1e-5)
    assert summary.shorter.value == pytest.approx(shorter)
    assert (summary.rows, summary.ties) == (6, 0)


def test_a_summary_before_training_is_one_half(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    summary = summarize_preferences(made, made.eval_dataset)
    assert (summary.ties, summary.accuracy.value) == (6, 0.5)
    assert summary.loss == pytest.approx(0.6931472, rel=1e-5)


def test_a_stream_is_summarized_like_a_dataset(trained: DPOTrainer) -> None:
    whole = summarize_preferences(trained, trained.eval_dataset)
    stream = summarize_preferences(trained, trained.eval_dataset.to_iterable_dataset())
    assert stream.margin.value == pytest.approx(whole.margin.value, rel=1e-5)
    assert stream.shorter == whole.shorter


def test_rows_that_are_not_prepared_are_refused(trained: DPOTrainer) -> None:
    with pytest.raises(DataError, match="not prepared"):
        summarize_preferences(trained, Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
