"""Callbacks of `DPOTrainer`: checkpointing's adapter, a moving reference, likelihood displacement, dead gradients."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkit.errors import CheckpointError, TrainingError
from alignkit.functional.preference import LOSSES
from alignkit.models.bundle import POLICY, ModelBundle
from alignkit.models.lora import is_quantized
from alignkit.models.reference_sync import sync_reference_adapter
from alignkit.trainers.config import DPOConfig

logger = logging.getLogger(__name__)

# Displacement is reported when the chosen log-prob has fallen by this many nats below the reference's, on average over
# the pairs of a window, in this many windows running.
DISPLACEMENT_NATS = 5.0
DISPLACEMENT_WINDOWS = 3
# Optimizer steps with gradients of exactly zero, running, that a quantized base is allowed.
DEAD_STEPS = 3


class ProtectCheckpointing(TrainerCallback):
    """Give activation checkpointing back its memory of the adapter, after `Trainer.train` turned it on its own way."""

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle

    def on_train_begin(self, args: DPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kwargs_of_torch: Any = args.activation_checkpointing_kwargs  # parsed by TrainingArguments by now
        self.bundle.protect_checkpointing(kwargs_of_torch)


class SyncReference(TrainerCallback):
    """TR-DPO (arXiv 2404.09656): move the reference towards the policy every `ref_model_sync_steps` steps.

    A reference adapter is saved with every checkpoint; a whole reference model is not, so such a run cannot resume.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle

    def on_train_begin(self, args: DPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bundle.reference is not None and state.global_step >= args.ref_model_sync_steps:
            raise CheckpointError(
                f"sync_ref_model had moved the reference by step {state.global_step}, and checkpoints of a model that "
                "is trained whole do not hold it. Start anew, or train a LoRA adapter, whose reference is saved."
            )

    @torch.no_grad()
    def on_step_end(self, args: DPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        alpha, bundle = args.ref_model_mixup_alpha, self.bundle
        if isinstance(bundle.model, PeftModel):
            error = sync_reference_adapter(bundle.model, str(bundle.adapters[POLICY]), alpha=alpha)
            if error > 1e-3:
                logger.info("sync_ref_model: the reference's rank cuts %.2g of the largest layer's change", error)
            return
        reference: Any = bundle.reference
        for target, source in zip(reference.parameters(), bundle.model.parameters(), strict=True):
            target.lerp_(source.to(target), alpha)


class DisplacementGuard(TrainerCallback):
    """Warn once when chosen completions become less likely together with rejected ones.

    A falling loss hides it: the margin grows while both sides lose probability, which goes to answers that nobody
    wrote (likelihood displacement, arXiv 2410.08847).
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.windows = 0
        self.has_warned = False

    def on_log(
        self,
        args: DPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # A window of unpaired rows may lack one side.
        if logs is None or not {"rewards/chosen", "rewards/rejected"} <= logs.keys() or self.has_warned:
            return
        chosen, rejected = (logs[f"rewards/{side}"] / self.beta for side in ("chosen", "rejected"))
        self.windows = self.windows + 1 if max(chosen, rejected) < -DISPLACEMENT_NATS else 0
        if self.windows == DISPLACEMENT_WINDOWS:
            self.has_warned = True
            warnings.warn(
                f"Chosen answers are becoming less likely, together with rejected ones: by {-chosen:.1f} and "
                f"{-rejected:.1f} nats against the reference (likelihood displacement). The margin still grows, but "
                "the model may drift to answers that nobody preferred. Remedies: loss_type=['sigmoid', 'sft'] or "
                "'dpop', a larger beta, a lower learning rate, or fewer pairs whose answers are nearly the same.",
                UserWarning,
                stacklevel=2,
            )


class LiveGradients(TrainerCallback):
    """Stop when a quantized base lets no gradient through.

    An inference pass outside the trainer can repack 4-bit layers on a CPU, after which every gradient below them is
    zero with nothing else to show for it. A single step without gradients may be healthy (a hinge loss that every pair
    satisfies), several in a row are not.
    """

    def __init__(self) -> None:
        self.dead_steps = 0

    def on_pre_optimizer_step(
        self, args: DPOConfig, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
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


def dpo_callbacks(bundle: ModelBundle, args: DPOConfig, beta: float) -> list[TrainerCallback]:
    """Return the callbacks that a DPO run needs."""
    callbacks: list[TrainerCallback] = []
    if any(LOSSES[name].needs_reference for name in args.loss_type):  # other rewards are no log-ratios
        callbacks.append(DisplacementGuard(beta))
    if args.activation_checkpointing:
        callbacks.append(ProtectCheckpointing(bundle))
    if args.sync_ref_model:
        callbacks.append(SyncReference(bundle))
    if isinstance(bundle.model, PeftModel) and is_quantized(bundle.base):
        callbacks.append(LiveGradients())
    return callbacks
