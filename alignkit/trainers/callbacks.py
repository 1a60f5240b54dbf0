"""Callbacks of `DPOTrainer`: a moving reference, and likelihood displacement."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkit.functional.preference import LOSSES
from alignkit.models.bundle import POLICY, ModelBundle
from alignkit.models.reference_sync import sync_reference_adapter
from alignkit.trainers.callbacks_engine import engine_callbacks
from alignkit.trainers.config import DPOConfig

logger = logging.getLogger(__name__)

# Displacement is reported when the chosen log-prob has fallen by this many nats below the reference's, on average over
# the pairs of a window, in this many windows running.
DISPLACEMENT_NATS = 5.0
DISPLACEMENT_WINDOWS = 3


class SyncReference(TrainerCallback):
    """TR-DPO (arXiv 2404.09656): move the reference towards the policy every `ref_model_sync_steps` steps.

    Checkpoints hold the reference: as an adapter, or among the states that the trainer registers.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle

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

    def state_dict(self) -> dict[str, Any]:
        """How many windows running showed it, and whether it was told."""
        return {"windows": self.windows, "has_warned": self.has_warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set both."""
        self.windows, self.has_warned = state_dict["windows"], state_dict["has_warned"]

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


def moving_reference(bundle: ModelBundle, args: DPOConfig) -> dict[str, Any]:
    """The reference as something to save, where it moves and is a model; an adapter is among the model's files."""
    return {"reference": bundle.reference} if args.sync_ref_model and bundle.reference is not None else {}


def dpo_callbacks(bundle: ModelBundle, args: DPOConfig, beta: float) -> list[TrainerCallback]:
    """Return the callbacks that a DPO run needs."""
    callbacks: list[TrainerCallback] = []
    if any(LOSSES[name].needs_reference for name in args.loss_type):  # other rewards are no log-ratios
        callbacks.append(DisplacementGuard(beta))
    if args.sync_ref_model:
        callbacks.append(SyncReference(bundle))
    return [*callbacks, *engine_callbacks(bundle, args)]
