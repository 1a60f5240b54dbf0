"""Which numbers a trainer computes with: adapters are cast by their own layers, whole models by autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from alignkit.trainers.passes import accelerator_arguments

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ChoosesPrecision(_Base):
    """Stands before `Trainer` among a trainer's parents."""

    model: Any

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast, where a model is trained whole; Trainer leaves it to the model's forward, without its hooks."""
        return self.accelerator.autocast()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        return accelerator_arguments(super()._build_accelerator_args(**kwargs), self.model)
