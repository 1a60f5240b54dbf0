"""Tiny runs of the three trainers that leave a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkit.checkpoint.manifest import MANIFEST, read_manifest, seal
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.bad_input import reward_trainer
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer
from tests.tiny_preferences import QUIET, character_tokenizer, lora, text_rows

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "logging_steps": 1}


def dpo(folder: Path, **options: Any) -> DPOTrainer:
    """DPO with LoRA on a tiny Llama."""
    settings = {**QUIET, **SAVING, "per_device_train_batch_size": 4, "activation_checkpointing": False, **options}
    return DPOTrainer(
        settings.pop("model", None) or tiny_model("llama"),
        args=DPOConfig(str(folder), learning_rate=1e-3, **settings),
        train_dataset=text_rows(8),
        processing_class=character_tokenizer(),
        peft_config=lora(),
    )


def reward(folder: Path, **options: Any) -> Any:
    """A reward model."""
    return reward_trainer(folder, **{**SAVING, **options})


def ppo(folder: Path, **options: Any) -> Any:
    """PPO with a critic."""
    return ppo_trainer(folder, **{**SAVING, "value_adapter": True, **options})


TRAINERS: dict[str, Callable[..., Any]] = {"dpo": dpo, "reward": reward, "ppo": ppo}


def reseal(folder: Path) -> None:
    """Seal a checkpoint that was changed, as whoever sends one to a stranger can."""
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    seal(folder, sequence=manifest.sequence, step=manifest.step, run=manifest.run)
