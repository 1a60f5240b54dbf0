"""The installed TRL's trainer and ours, side by side: same weights, same adapter, same rows, fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from alignkit.data.collate import ID_COLUMNS
from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from tests.model_factory import tiny_model
from tests.tiny_preferences import QUIET, adapter_weights, character_tokenizer, lora, randomise_adapter

LEARNING_RATE = 1e-3
# transformers renamed an option that TRL's own code still sets and reads under the old name.
RENAMED_OPTION_WARNINGS = (
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


class Twins(NamedTuple):
    """Both trainers, and the rows that both train on, as token ids."""

    theirs: Trainer
    ours: DPOTrainer
    rows: list[dict[str, Any]]


def trl_module(name: str) -> Any:
    """`trl` or one of its modules; skips where it is not installed."""
    return pytest.importorskip(name)


def build_theirs(folder: Path, rows: Sequence[dict[str, Any]], *, trainer_options: Any = None, **options: Any) -> Any:
    """TRL's DPOTrainer on a tiny Llama with a random adapter."""
    trl = trl_module("trl")
    settings = {"learning_rate": LEARNING_RATE, "gradient_checkpointing": False, **QUIET, **options}
    trainer = trl_module("trl.trainer.dpo_trainer").DPOTrainer(
        tiny_model("llama"),
        args=trl.DPOConfig(str(folder / "theirs"), **settings),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=character_tokenizer(),
        peft_config=lora(),
        **(trainer_options or {}),
    )
    randomise_adapter(trainer.model)
    return trainer


def build_ours(
    folder: Path, rows: Sequence[dict[str, Any]], *, trainer_options: Any = None, **options: Any
) -> DPOTrainer:
    """Our DPOTrainer on the same model with the same adapter."""
    settings = {"learning_rate": LEARNING_RATE, "activation_checkpointing": False, **QUIET, **options}
    trainer = DPOTrainer(
        tiny_model("llama"),
        args=DPOConfig(str(folder / "ours"), **settings),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=character_tokenizer(),
        peft_config=lora(),
        **(trainer_options or {}),
    )
    randomise_adapter(trainer.model)
    return trainer


def assert_twins(theirs: Trainer, ours: DPOTrainer) -> None:
    """Every weight is the same to the bit, frozen or not, before anything runs."""
    expected, found = dict(theirs.model.named_parameters()), dict(ours.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert weight.dtype == torch.float32
        assert torch.equal(found[name], weight), name
        assert found[name].requires_grad == weight.requires_grad, name


def token_rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    """The id columns of a prepared dataset."""
    return [{column: list(row[column]) for column in ID_COLUMNS} for row in dataset]


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` by every trainable tensor; zero where it reaches none."""
    weights = adapter_weights(model)
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))
