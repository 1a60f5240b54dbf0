"""Long tiny runs, each for a process of its own: one that is left alone, and those that are killed on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset, disable_progress_bars
from transformers import Trainer, TrainerCallback

from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer, prompts
from tests.tiny_preferences import QUIET, character_tokenizer, lora, randomise_adapter, text_rows

STEPS = 500
MEASURED_EVERY_STEPS = 10
OPTIONS: dict[str, Any] = {
    **QUIET,
    "use_cpu": True,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 20,
    "save_total_limit": 2,
    "logging_steps": 7,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "activation_checkpointing": False,
}
TARGETS = ["q_proj", "down_proj"]


def dpo_run(folder: Path) -> Trainer:
    """LoRA with dropout, and a reference that follows."""
    options = {**OPTIONS, "disable_dropout": False, "sync_ref_model": True, "ref_model_sync_steps": 30}
    trainer = DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(str(folder), **options),
        train_dataset=Dataset.from_list(text_rows(31)),
        processing_class=character_tokenizer(),
        peft_config=lora(lora_dropout=0.2, target_modules=TARGETS),
    )
    randomise_adapter(trainer.model)
    return trainer


def ppo_run(folder: Path) -> Trainer:
    """Rollouts of four steps, an adaptive KL coefficient, rewards scaled by their history, a critic of its own."""
    return ppo_trainer(
        folder,
        train_dataset=prompts(10),
        peft_config=lora(target_modules=TARGETS),
        **{**OPTIONS, "num_ppo_epochs": 4, "max_completion_length": 5, "kl_target": 3.0, "kl_horizon": 200},
        normalize_rewards=True,
        value_adapter=True,
    )


RUNS = {"dpo": dpo_run, "ppo": ppo_run}


class Figures(TrainerCallback):
    """Writes what the process holds, every few steps: memory in bytes, and open files."""

    def __init__(self, path: Path) -> None:
        self.path, self.process = path, psutil.Process()
        self.rows: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % MEASURED_EVERY_STEPS == 0:
            held = {"bytes": self.process.memory_info().rss, "files": self.process.num_fds()}
            self.rows.append({"step": state.global_step, **held})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.path.write_text(json.dumps(self.rows), encoding="utf-8")


def train(name: str, folder: Path, said: Path, figures: Path | None) -> None:
    """Begin the run, or go on with it, in this process.

    Args:
        name: of the run.
        folder: its output directory.
        said: a file for what the process says.
        figures: a file for what it holds; `None` to measure nothing.
    """
    with said.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    disable_progress_bars()
    torch.set_num_threads(1)
    trainer = RUNS[name](folder)
    if figures is not None:
        trainer.add_callback(Figures(figures))
    trainer.train(resume_from_checkpoint="auto")
