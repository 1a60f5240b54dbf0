"""Tiny runs that stand still in one phase, so that a signal can be sent to them there.

A process of `multiprocessing`'s fork server runs `run`: a real process with handlers of its own, whose imports were
made once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from alignkit import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from alignkit.trainers.ppo_callbacks import PPOCallback
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer, prompts, vowels
from tests.tiny_preferences import QUIET, character_tokenizer, lora, token_rows

LAST_STEP = 8
OPTIONS: dict[str, Any] = {
    **QUIET,
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 3,
    "max_steps": LAST_STEP,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "activation_checkpointing": False,
    "disable_dropout": False,
}
PPO_OPTIONS: dict[str, Any] = {
    **{name: value for name, value in OPTIONS.items() if name != "disable_dropout"},
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "max_completion_length": 5,
    "kl_target": 3.0,
    "normalize_rewards": True,
}


class Still:
    """Stands still once, at the moment that is asked for: leaves a file as a sign, then waits to be interrupted."""

    def __init__(self, sign: Path, phase: str | None) -> None:
        self.sign, self.phase = sign, phase

    def here(self, phase: str) -> None:
        if phase == self.phase and not self.sign.exists():
            self.sign.touch()
            until = time.monotonic() + 60
            while time.monotonic() < until:
                time.sleep(0.01)


class SlowTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that stands still while it is saved, in the middle of a checkpoint."""

    still: Still
    saves = 0

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        type(self).saves += 1
        if type(self).saves == 1:
            until = time.monotonic() + 1.5
            if self.still.phase == "saving" and not self.still.sign.exists():
                self.still.sign.touch()
                while time.monotonic() < until:
                    time.sleep(0.01)
        return super().save_pretrained(*args, **kwargs)


class Phases(TrainerCallback):
    """Stands still in evaluation, and between the micro-batches of a step."""

    def __init__(self, still: Still) -> None:
        self.still = still

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.still.here("between micro-batches")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.still.here("evaluation")


class PPOPhases(PPOCallback):
    """Stands still in a rollout's scoring and in a minibatch."""

    def __init__(self, still: Still) -> None:
        self.still = still

    def on_rewards(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            self.still.here("rollout")

    def on_minibatch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.still.here("minibatch")


def run(method: str, folder: Path, phase: str | None = None, sign: Path = Path("none"), asked: Any = "auto") -> None:
    """Train to the end, or stand still in `phase` until interrupted."""
    disable_progress_bars()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    still = Still(sign, phase)
    still.here("start")
    make = {"dpo": _dpo, "reward": _reward, "ppo": _ppo}[method]
    make(folder, still).train(asked)


def _watch_forward(model: nn.Module, still: Still, trainer: Any) -> None:
    """Stand still in a forward pass of the sixth step."""

    def watch(*_: Any) -> None:
        if trainer.state.global_step == 5:
            still.here("forward")

    model.register_forward_pre_hook(watch)


def _tokenizer(still: Still) -> SlowTokenizer:
    plain = character_tokenizer()
    special = {name: getattr(plain, name) for name in ("pad_token", "bos_token", "eos_token")}
    tokenizer = SlowTokenizer(tokenizer_object=plain.backend_tokenizer, **special)
    tokenizer.still = still
    return tokenizer


def _rows(still: Still) -> Dataset:
    def rows() -> Any:
        for row in token_rows(24):
            still.here("data preparation")
            yield row

    return Dataset.from_list(list(rows()))


def _pairs(kind: Any, config: Any, folder: Path, still: Still, **options: Any) -> Any:
    """A trainer on preference pairs."""
    model = tiny_model("llama")
    if still.phase == "reference caching":
        model.register_forward_pre_hook(lambda *_: still.here("reference caching"))
    trainer = kind(
        model,
        args=config(str(folder), **OPTIONS, **options),
        train_dataset=_rows(still),
        eval_dataset=Dataset.from_list(token_rows(4, seed=3)),
        processing_class=_tokenizer(still),
        peft_config=lora(lora_dropout=0.1),
        callbacks=[Phases(still)],
    )
    _watch_forward(model, still, trainer)
    return trainer


def _dpo(folder: Path, still: Still) -> DPOTrainer:
    cache = {"precompute_ref_log_probs": True, "reference_cache_dir": str(folder / "cache")}
    return _pairs(DPOTrainer, DPOConfig, folder, still, **cache)


def _reward(folder: Path, still: Still) -> RewardTrainer:
    return _pairs(RewardTrainer, RewardConfig, folder, still)


def _ppo(folder: Path, still: Still) -> Any:
    calls = [0]

    def reward(completions: list[str], **columns: Any) -> list[float]:
        calls[0] += 1
        if len(completions) == 3:
            still.here("evaluation")
        elif calls[0] == 2:
            still.here("reward call")
        return vowels(completions)

    return ppo_trainer(
        folder,
        reward,
        train_dataset=prompts(12),
        eval_dataset=prompts(3, seed=5),
        callbacks=[Phases(still), PPOPhases(still)],
        processing_class=_tokenizer(still),
        **PPO_OPTIONS,
    )
