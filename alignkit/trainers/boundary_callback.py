"""Where a run stands after an optimizer step: what of logging, evaluating and saving it still has to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from alignkit.trainers.checkpointing import KeepsCheckpoints


@dataclass(frozen=True, slots=True)
class Rest:
    """What a run still owes at a step, for the one that resumes there.

    Attributes:
        log, evaluate, save: Trainer's flags.
        in_step: they are those of the step; at the end of an epoch, its own come after them.
        is_stopped: somebody asked training to end with this step.
        grad_norm, learning_rate: of the step, for the log.
    """

    log: bool = False
    evaluate: bool = False
    save: bool = False
    in_step: bool = False
    is_stopped: bool = False
    grad_norm: float | None = None
    learning_rate: float | None = None

    @classmethod
    def of(cls, control: TrainerControl, grad_norm: Any, learning_rate: float | None, *, in_step: bool) -> Rest:
        """What `control` asks for at this moment."""
        return cls(
            log=control.should_log,
            evaluate=control.should_evaluate,
            save=control.should_save,
            in_step=in_step,
            is_stopped=control.should_training_stop,
            grad_norm=grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm,
            learning_rate=learning_rate,
        )


class KeepBoundaries(TrainerCallback):
    """Tells a trainer that keeps checkpoints when a step begins, moves weights, and ends."""

    def __init__(self, trainer: KeepsCheckpoints) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin_training()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin_update()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.end_epoch()


class ExportedState:
    """A callback that tells its state in Trainer's way, as one that the registry takes."""

    def __init__(self, callback: ExportableState) -> None:
        self.callback = callback

    def state_dict(self) -> dict[str, Any]:
        """The attributes that the callback names."""
        return dict(self.callback.state()["attributes"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set them."""
        for name, value in state_dict.items():
            setattr(self.callback, name, value)
