"""PPO runs that are asked for what cannot be, or whose rewards fail: said at once, or counted, never silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from alignkit.errors import AlignkitError, ConfigError, DataError, TrainingError
from alignkit.models.adapters import add_adapter
from alignkit.trainers import ppo
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.ppo_factory import TINY, ppo_trainer, prompts, vowels
from tests.tiny_preferences import QUIET, character_tokenizer, lora, text_rows

# --- told before anything is generated ---


def wants_answer(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def with_column(name: str, count: int = 4) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], name: "x"} for row in text_rows(count)]


LATE: dict[str, tuple[dict[str, Any], type[AlignkitError], str]] = {
    "a column of an argument's name": (
        {"train_dataset": with_column("completions")},
        DataError,
        "column 'completions' has the name of an argument of rewards",
    ),
    "such a column of held-out prompts": (
        {"eval_dataset": with_column("trainer_state")},
        DataError,
        "column 'trainer_state' has the name of an argument of rewards",
    ),
    "held-out prompts without a column": (
        {"reward_funcs": wants_answer, "train_dataset": with_column("answer"), "eval_dataset": {"a": prompts(2)}},
        ConfigError,
        "asks for 'answer', which the eval_a dataset does not have",
    ),
    "a held-out prompt beyond the model": (
        {"eval_dataset": [{"prompt": "d" * 60}], "model": tiny_model("llama", max_position_embeddings=64)},
        DataError,
        "more than the model's 64 positions",
    ),
    "the best of several sets": (
        {
            "eval_dataset": {"a": prompts(2), "b": prompts(2)},
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "save_strategy": "steps",
        },
        ConfigError,
        "metric_for_best_model='a_reward'",
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_what_would_fail_later_is_refused_at_once(tmp_path: Path, case: str):
    given, error, message = LATE[case]
    given = dict(given)
    with pytest.raises(error, match=message):
        ppo_trainer(tmp_path, given.pop("reward_funcs", vowels), random=False, **given)


@pytest.mark.parametrize("options", [{}, {"metric_for_best_model": "reward"}])
def test_a_schedule_does_not_take_rewards_for_losses(tmp_path: Path, options: dict[str, Any]):
    settings = {**TINY, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", **options}
    with pytest.raises(ConfigError, match="set metric_for_best_model='reward' and lr_scheduler_kwargs"):
        PPOConfig(str(tmp_path), **settings)
    PPOConfig(str(tmp_path), **{**settings, "metric_for_best_model": "reward", "lr_scheduler_kwargs": {"mode": "max"}})


def test_there_is_no_loss_to_be_best_at(tmp_path: Path):
    with pytest.raises(ConfigError, match="metric_for_best_model='loss': evaluations have no loss"):
        PPOConfig(str(tmp_path), **{**TINY, "metric_for_best_model": "loss"})


def test_nothing_is_predicted(tmp_path: Path):
    with pytest.raises(ConfigError, match="PPOTrainer predicts nothing: evaluate"):
        ppo_trainer(tmp_path).predict(prompts(2))


def test_the_best_checkpoint_lies_between_rollouts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = ppo_trainer(
        tmp_path,
        num_ppo_epochs=4,
        max_steps=5,
        save_strategy="best",
        metric_for_best_model="reward",
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset=prompts(2),
    )
    assert "eval_steps=3 becomes 4" in caplog.text
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


# --- of every trainer ---

TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ppo": (PPOTrainer, PPOConfig, {"reward_funcs": vowels, "train_dataset": prompts()}),
    "reward": (RewardTrainer, RewardConfig, {"train_dataset": text_rows(4)}),
    "dpo": (DPOTrainer, DPOConfig, {"train_dataset": text_rows(4)}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_an_optimizer_that_would_train_nothing_new_is_refused(tmp_path: Path, name: str):
    kind, config, given = TRAINERS[name]
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"lacks .* trainable parameters, such as '.*', which would never move"):
        kind(
            model,
            args=config(str(tmp_path), **QUIET),
            processing_class=character_tokenizer(),
            peft_config=lora(),
            optimizers=(optimizer, None),
            **given,
        )


def test_an_optimizer_of_an_adapter_alone_would_leave_the_critic_at_zero(tmp_path: Path):
    def trainer(**options: Any) -> PPOTrainer:
        model = add_adapter(tiny_model("llama"), lora())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        args = PPOConfig(str(tmp_path), **{**TINY, **options})
        tokenizer = character_tokenizer()
        return PPOTrainer(model, vowels, args, prompts(), processing_class=tokenizer, optimizers=(optimizer, None))

    with pytest.raises(ConfigError, match=r"lacks 1 of \d+ trainable parameters, such as '.*value\.weight'"):
        trainer()
    trainer(advantage_estimator="rloo", num_generations=2).train()


@pytest.mark.parametrize("name", TRAINERS)
def test_arguments_of_another_trainer_are_refused(tmp_path: Path, name: str):
    kind, config, given = TRAINERS[name]
    with pytest.raises(ConfigError, match=f"args must be a {config.__name__}, not a TrainingArguments"):
        kind(tiny_model("llama"), args=TrainingArguments(str(tmp_path), use_cpu=True), peft_config=lora(), **given)


# --- rewards that fail for some ---


def no_reward_for(*prompts: str) -> Any:
    def judge(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None if prompt in lost else float(len(text)) for prompt, text in zip(prompts, completions, strict=True)]

    lost = prompts
    return judge


def test_an_evaluation_goes_on_without_what_was_dropped(tmp_path: Path):
    trainer = ppo_trainer(tmp_path, no_reward_for("zzz"), on_reward_error="drop")
    held_out = [*prompts(16, seed=3), {"prompt": "zzz"}]  # 16 are completed together, and then one
    metrics = trainer.evaluate(held_out)
    assert metrics["eval_rewards/dropped"] == 1
    assert metrics["eval_reward"] == pytest.approx(trainer.evaluate(held_out[:16])["eval_reward"])
    with pytest.raises(TrainingError, match="none of the 2 held-out completions has a reward"):
        trainer.evaluate([{"prompt": "zzz"}] * 2)


def test_a_rollout_of_which_nothing_is_left_stops_the_run(tmp_path: Path):
    trainer = ppo_trainer(tmp_path, no_reward_for(*prompts()["prompt"]), on_reward_error="drop")
    with pytest.raises(TrainingError, match=r"all 4 samples were dropped: no source applies \(4\)\. There is nothing"):
        trainer.train()


def test_a_call_that_raises_loses_its_own_samples_alone(tmp_path: Path):
    calls: list[int] = []

    def judge(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 2:
            raise ConnectionError("try again")
        return [float(len(text)) for text in completions]

    trainer = ppo_trainer(tmp_path, judge, on_reward_error="drop", reward_batch_size=1)
    trainer.train()
    assert calls == [1, 1, 1, 1]
    assert trainer.rollout.rewards.kept.tolist() == [True, False, True, True]
    assert trainer.rollout.rewards.dropped == {"judge: raised": 1}


# --- the coefficient ---


def test_the_kl_coefficient_in_the_loss_is_the_one_that_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    used: list[float] = []
    loss = ppo.ppo_loss

    def watched(*given: Any, **options: Any) -> Any:
        used.append(options["kl_coef"])
        return loss(*given, **options)

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    options = {"kl_estimator": "k2", "kl_place": "loss", "whiten_advantages": False, "kl_coef": 0.1}
    trainer = ppo_trainer(tmp_path, kl_target=1e-3, kl_horizon=40, num_ppo_epochs=2, max_steps=4, **options)
    trainer.train()
    logged = [entry["objective/kl_coef"] for entry in trainer.state.log_history if "objective/kl_coef" in entry]
    assert logged == pytest.approx([0.1, 0.1 * (1 + 0.2 * 4 / 40)])
    assert used == [logged[0], logged[0], logged[1], logged[1]]
