"""Tiny runs whose trainer publishes, for the client process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import alignkit
from tests.ppo_factory import vowels
from tests.tiny_preferences import QUIET, lora, text_rows

_TINY: dict[str, Any] = {
    **QUIET,
    "use_cpu": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "push_to_hub": True,
}


def make_trainer(method: str, folder: str, base: str, options: dict[str, Any], row: dict[str, Any]) -> Any:
    """Make a tiny trainer; see `train` for the arguments."""
    settings = {**_TINY, "output_dir": folder, **options}
    rows = Dataset.from_list([{**each, **row} for each in text_rows(8)])
    if method == "ppo":
        args = alignkit.PPOConfig(**settings, max_completion_length=5, num_ppo_epochs=1)
        return alignkit.PPOTrainer(base, vowels, args, rows.select_columns(["prompt", *row]), peft_config=lora())
    if method == "reward":
        return alignkit.RewardTrainer(base, alignkit.RewardConfig(**settings), train_dataset=rows, peft_config=lora())
    return alignkit.DPOTrainer(base, args=alignkit.DPOConfig(**settings), train_dataset=rows, peft_config=lora())


def train(
    method: str,
    folder: str,
    base: str,
    options: dict[str, Any] | None = None,
    row: dict[str, Any] | None = None,
    then: str = "push",
    recorded_base: str | None = None,
    **arguments: Any,
) -> Any:
    """Train for two steps, and then do what a user would.

    Args:
        method: "dpo", "reward" or "ppo".
        folder: the output directory.
        base: the base model's folder.
        options: of the configuration.
        row: columns that every row of the data gets.
        then: "push" with the trainer's own method, "publish" with ours, "save" the model, "make" no more than the
            trainer, or "nothing" after training.
        recorded_base: what the adapter calls its base after training, if not `base`.
        **arguments: for what comes after.
    """
    torch.manual_seed(0)
    trainer = make_trainer(method, folder, base, options or {}, row or {})
    if then == "make":
        return None
    trainer.train()
    if recorded_base is not None:
        trainer.model.peft_config["default"].base_model_name_or_path = recorded_base
    if then == "push":
        found = trainer.push_to_hub(**arguments)
        return None if found is None else found._asdict()
    if then == "publish":
        return alignkit.publish(trainer, **arguments)._asdict()
    if then == "save":
        trainer.save_model()
    return Path(folder).name
