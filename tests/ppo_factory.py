"""Tiny PPO runs for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerCallback

from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_loss import ChunkScores, token_columns
from tests.model_factory import tiny_model
from tests.tiny_preferences import QUIET, character_tokenizer, lora, randomise_adapter, text_rows

ARGUMENTS = ("model", "train_dataset", "eval_dataset", "callbacks", "ptx_dataset", "peft_config", "processing_class")
QUIET_LOSS = {"vf_coef": 0.0, "kl_coef": 0.0, "whiten_advantages": False}
TINY: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 4,
    "num_ppo_epochs": 1,
    "max_completion_length": 7,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-4,  # keeps rounding noise from becoming whole steps
    "max_steps": 1,
    "max_tokens_per_forward": None,
    "activation_checkpointing": False,
    "use_cpu": True,
}


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """A reward that a reader can check: the share of vowels, and a little for length."""
    return [sum(letter in "aeiouAEIOU" for letter in text) + 0.1 * len(text) for text in completions]


def prompts(count: int = 16, seed: int = 0) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_list([{"prompt": row["prompt"]} for row in text_rows(count, seed=seed)])


def ppo_trainer(
    folder: Path, reward: Any = vowels, *, kind: type[PPOTrainer] = PPOTrainer, random: bool = True, **given: Any
) -> PPOTrainer:
    """A trainer whose policy, critic and reference differ from the start.

    Args:
        folder: where it writes.
        reward: what rewards.
        kind: which class.
        random: give adapters and value head seeded noise.
        **given: arguments of the trainer, or options of its configuration.
    """
    names = (*ARGUMENTS, "args", "reward_processing_classes")
    arguments = {name: given.pop(name) for name in names if name in given}
    trainer = kind(
        **{
            "model": tiny_model("llama"),
            "reward_funcs": reward,
            "args": PPOConfig(str(folder), **{**TINY, **given}),
            "train_dataset": prompts(),
            "processing_class": character_tokenizer(),
            "peft_config": lora(),
            **arguments,
        }
    )
    if random:
        randomise_adapter(trainer.model)
    return trainer


@contextlib.contextmanager
def scaling_on_a_cpu() -> Iterator[None]:
    """Let accelerate scale gradients as for fp16 on CUDA; what is computed stays fp32."""
    original = Accelerator.__init__

    def with_scaler(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu"), True

    with (
        mock.patch.object(Accelerator, "__init__", with_scaler),
        mock.patch.object(Accelerator, "mixed_precision", "fp16"),
    ):
        yield


class WatchedTrainer(PPOTrainer):
    """Keeps what every chunk was trained with: scores, the rollout's columns at its tokens, the step's number."""

    seen: list[tuple[ChunkScores, dict[str, torch.Tensor], int]]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, scores = super().compute_loss(model, inputs, True, num_items_in_batch)
        seen = self.__dict__.setdefault("seen", [])
        seen.append((scores, token_columns(inputs, self._passes.lay_out(inputs)), self.state.global_step))
        return (loss, scores) if return_outputs else loss


class Gradients(TrainerCallback):
    """Keeps a copy of every step's gradients, where there are any; for runs with `max_grad_norm=0`."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
        self.steps.append({name: gradient.clone() for name, gradient in found.items() if gradient is not None})


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """A copy of everything trainable."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def nothing(completions: list[str], **columns: Any) -> list[float]:
    """A reward of 0 for everything."""
    return [0.0] * len(completions)


def restore(trainer: PPOTrainer, start: dict[str, torch.Tensor]) -> None:
    """Set trainable parameters back to `start`, by name."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in start:
                parameter.copy_(start[name])


def plain_logps(trainer: PPOTrainer, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """Log-probs of `answer`, `(T,)`, from the model's own logits."""
    logits = trainer.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def lora_gradients(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Gradients of the adapters, by name."""
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in name}
