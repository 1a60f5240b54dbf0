"""The tiny runs that are killed: one for each trainer, with dropout and with whatever has a state of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer

from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer, prompts
from tests.tiny_preferences import QUIET, character_tokenizer, lora, randomise_adapter, text_rows

# Two checkpoints, of which the second replaces the first; the logging window is open at both.
SAVED, STEPS = (2, 4), 4
OPTIONS: dict[str, Any] = {
    **QUIET,
    "use_cpu": True,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED[0],
    "save_total_limit": 1,
    "logging_steps": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "activation_checkpointing": False,
    "lr_scheduler_type": "cosine",
}


def dpo_run(folder: Path, **options: Any) -> Trainer:
    """LoRA with dropout, and a reference that follows the policy."""
    settings = {"disable_dropout": False, "sync_ref_model": True, "ref_model_sync_steps": 2, "beta": 0.5}
    return _preference_run(folder, Dataset.from_list(text_rows(10)), settings | options)


def kto_run(folder: Path, **options: Any) -> Trainer:
    """Unpaired rows, whose KL estimate pairs each with another, and LoRA with dropout."""
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in text_rows(8)
        for name in ("chosen", "rejected")
    ]
    settings = {"disable_dropout": False, "loss_type": "kto", "per_device_train_batch_size": 2}
    return _preference_run(folder, Dataset.from_list(rows), settings | options)


def _preference_run(folder: Path, rows: Dataset, options: dict[str, Any]) -> Trainer:
    trainer = DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(str(folder), **{**OPTIONS, **options}),
        train_dataset=rows,
        processing_class=character_tokenizer(),
        peft_config=lora(lora_dropout=0.2, target_modules=["q_proj", "down_proj"]),
    )
    randomise_adapter(trainer.model)
    return trainer


def reward_run(folder: Path, **options: Any) -> Trainer:
    """Two heads, and LoRA with dropout."""
    trainer = RewardTrainer(
        tiny_model("llama"),
        args=RewardConfig(str(folder), **{**OPTIONS, "disable_dropout": False, "num_heads": 2, **options}),
        train_dataset=Dataset.from_list(text_rows(10)),
        processing_class=character_tokenizer(),
        peft_config=lora(lora_dropout=0.2, target_modules=["q_proj", "down_proj"]),
    )
    randomise_adapter(trainer.model)
    return trainer


def ppo_run(folder: Path, **options: Any) -> Trainer:
    """Rollouts of two steps, an adaptive KL coefficient, rewards scaled by their history, a critic of its own."""
    settings = {
        "num_ppo_epochs": 2,
        "max_completion_length": 4,
        "kl_target": 3.0,
        "kl_horizon": 20,
        "normalize_rewards": True,
        "value_adapter": True,
    }
    return ppo_trainer(
        folder,
        train_dataset=prompts(10),
        peft_config=lora(target_modules=["q_proj", "down_proj"]),
        **{**OPTIONS, **settings, **options},
    )


RUNS: dict[str, Callable[..., Trainer]] = {"dpo": dpo_run, "kto": kto_run, "reward": reward_run, "ppo": ppo_run}
