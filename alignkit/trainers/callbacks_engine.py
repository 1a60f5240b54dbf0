"""Callbacks of every trainer: checkpointing's adapter, and gradients that a quantized base lets through."""

from __future__ import annotations

from typing import Any

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


def engine_callbacks(bundle: ModelBundle, args: EngineConfig) -> list[TrainerCallback]:
    """Return the callbacks that any run on the engine needs."""
    callbacks: list[TrainerCallback] = []
    if args.activation_checkpointing:
        callbacks.append(ProtectCheckpointing(bundle))
    if isinstance(bundle.model, PeftModel) and is_quantized(bundle.base):
        callbacks.append(LiveGradients())
    return callbacks
