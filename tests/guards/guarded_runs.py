"""Tiny runs of every trainer, and what disturbs them: numbers that are not finite, memory that ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from alignkit.trainers.config import DPOConfig
from alignkit.trainers.dpo import DPOTrainer
from alignkit.trainers.ppo import PPOTrainer
from alignkit.trainers.reward import RewardTrainer
from alignkit.trainers.reward_config import RewardConfig
from tests.model_factory import tiny_model
from tests.ppo_factory import ppo_trainer, prompts, vowels
from tests.tiny_preferences import (
    QUIET,
    adapter_weights,
    character_tokenizer,
    lora,
    randomise_adapter,
    token_rows,
)

KINDS = ("dpo", "kto", "reward", "ppo")
TRAINERS = {"dpo": DPOTrainer, "kto": DPOTrainer, "reward": RewardTrainer, "ppo": PPOTrainer}
OPTIONS: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-4,  # keeps rounding noise from becoming whole steps
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "activation_checkpointing": False,
    "max_tokens_per_forward": None,
    "use_cpu": True,
}
CLOCKS = ("per_second", "memory", "time")
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory")
POISON = 126  # a token that only poisoned rows have: '~'


def rows(count: int = 16, *, labelled: bool = False, poisoned: tuple[int, ...] = ()) -> Dataset:
    """Token rows; the poisoned ones end their chosen completion with a token that no other row has."""
    made = token_rows(count, seed=3)
    for number, row in enumerate(made):
        if labelled:
            row["label"] = number % 3 == 0
        if number in poisoned:
            row["chosen_ids"] = [POISON, *row["chosen_ids"]]
    return Dataset.from_list(made)


def make_trainer(kind: str, folder: Path, callbacks: list[TrainerCallback] | None = None, **given: Any) -> Any:
    """A trainer of one of `KINDS`, over the same few rows every time, in their order."""
    poisoned = given.pop("poisoned", ())
    data = given.pop("train_dataset", None)
    classes = given.pop("classes", {})
    model = given.pop("model", None) or tiny_model("llama")
    evaluation = given.pop("eval_dataset", None)
    options = {**OPTIONS, "train_sampling_strategy": "sequential", **given}
    if kind == "ppo":
        options.pop("train_sampling_strategy")
        return ppo_trainer(
            folder,
            options.pop("reward", vowels),
            kind=classes.get("ppo", PPOTrainer),
            model=model,
            train_dataset=prompts() if data is None else data,
            callbacks=callbacks,
            **({} if evaluation is None else {"eval_dataset": evaluation}),
            **options,
        )
    make, config = (RewardTrainer, RewardConfig) if kind == "reward" else (DPOTrainer, DPOConfig)
    extra = {"loss_type": "kto", "beta": 0.5} if kind == "kto" else {}
    trainer = classes.get(kind, make)(
        model,
        args=config(str(folder), **{**options, **extra}),
        train_dataset=rows(labelled=kind == "kto", poisoned=poisoned) if data is None else data,
        eval_dataset=evaluation,
        processing_class=character_tokenizer(),
        peft_config=lora(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM"),
        callbacks=callbacks,
    )
    randomise_adapter(trainer.model)
    return trainer


class Watch(TrainerCallback):
    """Copies weights, optimizer state and gradients around every step, and tells others where the run stands.

    Attributes:
        step: number of the open step, 0 between steps.
        micro_batch: number of the open micro-batch of the step, from 0.
        before, after: `(weights, optimizer state)` by step.
        gradients: as the optimizer found them, by step; `None` where it found none.
    """

    def __init__(self) -> None:
        self.step = self.micro_batch = 0
        self.before: dict[int, Any] = {}
        self.after: dict[int, Any] = {}
        self.gradients: dict[int, dict[str, Tensor | None]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self.micro_batch = state.global_step + 1, 0
        self.before[self.step] = self._copy(**kwargs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batch += 1

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients[self.step] = {
            name: None if weight.grad is None else weight.grad.clone()
            for name, weight in adapter_weights(model).items()
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[self.step] = self._copy(**kwargs)
        self.step = 0

    @staticmethod
    def _copy(model: Any = None, optimizer: Any = None, **kwargs: Any) -> tuple[dict[str, Tensor], Any]:
        weights = {name: weight.detach().clone() for name, weight in adapter_weights(model).items()}
        return weights, copy.deepcopy(optimizer.state_dict()["state"])


class DropGradients(TrainerCallback):
    """Makes some steps of an undisturbed run without gradients: what a skipped step comes to."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            model.zero_grad(set_to_none=True)


def spoil_loss(base: type, watch: Watch, steps: tuple[int, ...], value: float) -> type:
    """A trainer whose loss is not finite in some steps, as that of a subclass could be."""

    class Spoilt(base):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * value if watch.step in steps else loss

    return Spoilt


def poison_tokens(model: Any, active: Callable[[], bool], value: float = float("nan")) -> None:
    """Make what the model says after the token `POISON` not finite, while `active`."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((inputs[0] == POISON)[..., None], value, output) if active() else output

    model.get_input_embeddings().register_forward_hook(hook)


def poison_gradient(trainer: Any, active: Callable[[], bool], value: float) -> None:
    """Make one element of one weight's gradient not finite, while `active`."""
    weight = next(iter(adapter_weights(trainer.model).values()))

    def hook(gradient: Tensor) -> Tensor:
        if not active():
            return gradient
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    weight.register_hook(hook)


def equal(first: Any, second: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are the same bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def training_log(trainer: Any) -> list[dict[str, float]]:
    """Log entries of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class FakeMemory:
    """Lets a model run out of memory as a device does: by torch's own error, from within a pass.

    Args:
        model: whose passes fail.
        limit: positions, or with `rows` sequences, that a pass may hold.
        when: whether it fails now, told the arguments of the pass.
        in_backward: fail in the backward pass instead.
        error: what is raised.

    Attributes:
        failures: numbers of what each failed pass held.
    """

    def __init__(
        self,
        model: Any,
        limit: int,
        when: Callable[[dict[str, Any]], bool],
        *,
        rows: bool = False,
        in_backward: bool = False,
        error: Exception | None = None,
    ) -> None:
        self.limit, self.when, self.rows = limit, when, rows
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSecond line")
        self.failures: list[int] = []
        self.model = model
        if in_backward:
            model.register_forward_pre_hook(self._note, with_kwargs=True)
            next(iter(model.model.layers)).register_forward_hook(self._arm)
        else:
            model.register_forward_pre_hook(self._check, with_kwargs=True)
        self._held = 0

    def _size(self, kwargs: dict[str, Any]) -> int:
        ids = kwargs["input_ids"]
        return ids.shape[0] if self.rows else ids.numel()

    def _check(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._fail_if(self._size(kwargs), self.when(kwargs))

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._held = self._size(kwargs) if self.when(kwargs) else 0

    def _arm(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden, held = output[0] if isinstance(output, tuple) else output, self._held
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._fail_if(held, True))

    def _fail_if(self, held: int, active: bool) -> None:
        if active and held > self.limit:
            self.failures.append(held)
            raise self.error


def messages(caplog: Any) -> list[str]:
    """What was logged about memory."""
    return [each.getMessage() for each in caplog.records if "out of memory" in each.getMessage()]
