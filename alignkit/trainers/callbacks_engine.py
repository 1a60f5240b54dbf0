"""Callbacks of every trainer: checkpointing's adapter, and gradients that a quantized base lets through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkit.errors import TrainingError
from alignkit.models.bundle import ModelBundle
from alignkit.models.lora import is_quantized
from alignkit.trainers.config_engine import EngineConfig

# Optimizer steps with gradients of exactly zero, running, that a quantized base is allowed.
DEAD_STEPS = 3


class ProtectCheckpointing(TrainerCallback):
    """Give activation checkpointing back its memory of the adapter, after `Trainer.train` turned it on its own way."""

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle

    def on_train_begin(self, args: EngineConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kwargs_of_torch: Any = args.activation_checkpointing_kwargs  # parsed by TrainingArguments by now
        self.bundle.protect_checkpointing(kwargs_of_torch)


class LiveGradients(TrainerCallback):
    """Stop when a quantized base lets no gradient through.

    An inference pass outside the trainer can repack 4-bit layers on a CPU, after which every gradient below them is
    zero with nothing else to show for it. A single step without gradients may be healthy (a hinge loss that every pair
    satisfies), several in a row are not.
    """

    def __init__(self) -> None:
        self.dead_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of such steps running."""
        return {"dead_steps": self.dead_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set it."""
        self.dead_steps = state_dict["dead_steps"]

    def on_pre_optimizer_step(
        self, args: EngineConfig, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients:
            return
        self.dead_steps = 0 if any(bool(gradient.any()) for gradient in gradients) else self.dead_steps + 1
        if self.dead_steps == DEAD_STEPS:
            raise TrainingError(
                f"step {state.global_step + 1}: every gradient has been exactly zero for {DEAD_STEPS} steps, so "
                "nothing trains. On a quantized base this means that an inference pass outside the trainer "
                "repacked its weights. Load the model anew, and generate through the trainer's own model."
            )


class PauseScaler(TrainerCallback):
    """Let optimizer steps without gradients pass under fp16, whose gradient scaler takes them for a mistake.

    In such a step a scaler that is switched off stands in: nothing is unscaled, and the scale stays what it was.

    Args:
        accelerator: whose scaler it is.
        is_skipped: whether the step that begins will have no gradients.
    """

    def __init__(self, accelerator: Accelerator, is_skipped: Callable[[], bool]) -> None:
        self.accelerator, self.is_skipped = accelerator, is_skipped
        self._paused: Any = None

    def pause(self, optimizer: Any) -> None:
        """Let the open step pass without the gradients that it had; the scaler forgets them."""
        scaler = self.accelerator.scaler
        if scaler is not None and self._paused is None:
            scaler.update(scaler.get_scale())  # the scale that it has: neither lowered nor on its way up
            self._paused = scaler
            self._use(torch.amp.GradScaler(enabled=False), optimizer)

    def on_step_begin(
        self, args: EngineConfig, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self.accelerator.scaler is not None and self.is_skipped():
            self._paused = self.accelerator.scaler
            self._use(torch.amp.GradScaler(enabled=False), optimizer)

    def on_optimizer_step(
        self, args: EngineConfig, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._paused is not None:
            self._use(self._paused, optimizer)
            self._paused = None

    def _use(self, scaler: Any, optimizer: Any) -> None:
        self.accelerator.scaler = optimizer.scaler = scaler  # accelerate's optimizer has a reference of its own


def engine_callbacks(bundle: ModelBundle, args: EngineConfig) -> list[TrainerCallback]:
    """Return the callbacks that any run on the engine needs."""
    callbacks: list[TrainerCallback] = []
    if args.activation_checkpointing:
        callbacks.append(ProtectCheckpointing(bundle))
    if isinstance(bundle.model, PeftModel) and is_quantized(bundle.base):
        callbacks.append(LiveGradients())
    return callbacks
