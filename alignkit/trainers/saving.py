"""How a trainer writes checkpoints and models: aside, sealed, then under their names; and which old ones may go."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from alignkit.checkpoint.atomic import discard, files_into, put_in_place, remove_folder, staging_of, tidy
from alignkit.checkpoint.find import checkpoint_folders, newest_verified, next_sequence, rotate, unscheduled
from alignkit.checkpoint.lock import make_output_dir
from alignkit.checkpoint.manifest import read_manifest, seal, verify
from alignkit.checkpoint.space import SMALL_FILES_BYTES, free_bytes, require_space, size
from alignkit.checkpoint.states import States, write_states
from alignkit.errors import AlignkitError, CheckpointError
from alignkit.trainers.boundary_callback import Rest
from alignkit.trainers.guards import check_finite
from alignkit.trainers.recording import save_description
from alignkit.trainers.resuming import (
    Fixed,
    describe_optimizer,
    describe_run,
    frozen_digest,
    further_data_digest,
    rewards_digest,
)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)

CARD = "README.md"


class SavesWhole(_Base):
    """What replaces the ways in which `Trainer` saves. `KeepsCheckpoints` builds on it.

    Attributes:
        states: everything stateful, by name; `states.register` adds to it.
        is_scheduled: whether the checkpoint that comes next is one that the user asked for.
    """

    args: Any
    state: Any
    states: States
    bundle: Any
    record: Any
    is_scheduled: bool
    _staging: Path | None = None
    _others: Collection[int] = ()  # saves in the output directory that another run made
    _fixed: Fixed | None = None
    _rewarding: Sequence[Any] = ()
    _mixed_in: Any = None
    _saved: tuple[int, Rest] | None = None  # step and rest of the last checkpoint of this training

    def __init__(self, *, args: Any, **kwargs: Any) -> None:
        if args.should_save:  # Trainer would make it too, and fail with the system's own error
            make_output_dir(Path(str(args.output_dir)))
        super().__init__(args=args, **kwargs)

    @property
    def is_saving_checkpoint(self) -> bool:
        """Whether what is being saved is a checkpoint, and no model for use."""
        return self._staging is not None

    def _write_checkpoint(self, run_dir: str, rest: Rest) -> Path:
        """Write a checkpoint aside, seal it, give it its name, and let old ones go."""
        step = self.state.global_step
        target = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        staged = staging_of(target)
        self.store_flos()
        try:
            if self.args.should_save:
                tidy(target.parent)
                require_space(target.parent, self._checkpoint_bytes(), f"checkpoint-{step}")
                staged.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which hold parts of weights
                check_finite(self.bundle.model)
            self._fill(staged, target, rest)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                run = {**self._description(), "is_scheduled": self.is_scheduled}
                seal(staged, sequence=next_sequence(target.parent), step=step, run=run)
                put_in_place(target)
        except AlignkitError:
            raise
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self._failed(target, error) from error
        finally:
            if self.args.should_save:
                discard(staged)  # whose own trouble does not hide what stopped the save
        if self.args.should_save:
            self._let_go(target)
        self.accelerator.wait_for_everyone()
        self._saved = step, rest
        return target

    def _fill(self, staged: Path, target: Path, rest: Rest) -> None:
        """Write all files of a checkpoint but the manifest."""
        self._staging = staged
        try:
            self.save_model(str(staged), _internal_call=True)
        finally:
            self._staging = None
        self.place_best(target.parent, coming=target)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staged))
            self._save_scaler(str(staged))
            self._save_rng_state(str(staged))
            content = {"states": self.states.state_dict(), "trainer": self._own_state(rest)}
            write_states(staged / f"states_{self.args.process_index}.safetensors", content)
        if self.args.should_save:
            self.state.stateful_callbacks = self._exported()
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def place_best(self, output_dir: Path, *, coming: Path | None = None) -> None:
        """Name the best checkpoint by where it lies: an output directory may have been moved since it was saved.

        Args:
            output_dir: where checkpoints lie.
            coming: one that will be there in a moment.
        """
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.is_dir() or best == coming):
            self.state.best_model_checkpoint = str(best)

    def _own_state(self, rest: Rest) -> dict[str, Any]:
        return {
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "first_step": self._initial_global_step,
            "max_steps": self.state.max_steps,
            "rest": asdict(rest),
        }

    def _exported(self) -> dict[str, Any]:
        """States of callbacks and control in Trainer's own form; several callbacks of a kind make a list."""
        found: dict[str, Any] = {}
        for each in (*self.callback_handler.callbacks, self.control):
            if not isinstance(each, ExportableState):
                continue
            kind = type(each).__name__
            before = found.get(kind)
            state = each.state()
            found[kind] = state if before is None else [*(before if isinstance(before, list) else [before]), state]
        return found

    def _let_go(self, target: Path) -> None:
        """Remove what the limits say, now that `target` is there and right."""
        output_dir = target.parent
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        spare = [folder for folder in unscheduled(output_dir, self._others) if folder != target]
        if not spare and (limit is None or len(checkpoint_folders(output_dir)) <= limit):
            return
        try:
            verify(target)
        except CheckpointError as error:
            raise CheckpointError(
                f"what was saved cannot be read back, so nothing older was removed: {error}"
            ) from error
        try:
            for folder in spare:
                remove_folder(folder)
            rotate(output_dir, limit, keep=(target, *([Path(best)] if best else [])))
        except OSError as error:  # the new checkpoint is whole, so that training can go on
            logger.warning("An older checkpoint could not be removed, and takes room: %s", error)

    def _checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: the last one's size, or weights and two moments of each in fp32."""
        folders = checkpoint_folders(Path(str(self.args.output_dir)))
        with contextlib.suppress(CheckpointError, IndexError):
            return read_manifest(folders[-1]).total_bytes
        model: Any = self.bundle.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        moments = 0 if self.args.save_only_model else 8 * sum(parameter.numel() for parameter in trained)
        return weights + moments + SMALL_FILES_BYTES

    def _failed(self, target: Path, error: Exception) -> CheckpointError:
        """What went wrong, what is missing, and what is left."""
        left = newest_verified(target.parent).folder
        free, needed = free_bytes(target.parent), self._checkpoint_bytes()
        missing = f"{size(needed - free)} are missing" if free < needed else f"{size(free)} are free"
        kept = f"{left.name} is whole and stays" if left else "there is no earlier checkpoint"
        return CheckpointError(
            f"{target} could not be saved: {error}. A checkpoint takes about {size(needed)}; {missing}. {kept}. Make "
            "room or choose another output_dir, then go on with resume_from_checkpoint='auto'."
        )

    def save_files(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write the model's files; `is_saving_checkpoint` tells what for."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(str(folder), state_dict=state_dict, is_main_process=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save model and tokenizer, and with a model for use its record and card; no pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        if self.is_saving_checkpoint:
            self._save_into(folder, state_dict)
            return
        with files_into(folder) as staged:
            self._save_into(staged, state_dict)
            (staged / CARD).unlink(missing_ok=True)  # PEFT's; the run's own card comes next, and keeps a person's text
        save_description(self, folder)

    def _save_into(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        self.save_files(folder, state_dict)
        tokenizer: Any = self.processing_class
        try:
            tokenizer.save_pretrained(str(folder))
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise OSError(str(error)) from error  # tokenizers has no better class for a disk that is full

    def _description(self) -> dict[str, Any]:
        """What the run is made of. Weights that make the reference are hashed at the first call, before training."""
        if self._fixed is None:
            bundle, is_computed = self.bundle, self.computes_reference
            is_source = is_computed and not bundle.can_reference
            is_moving = self.states_hold_reference
            self._fixed = Fixed(
                frozen_digest(bundle.model, bundle.reference, is_moving=is_moving, is_source=is_source),
                further_data_digest(self.train_dataset, self._mixed_in, is_computed=is_computed),
                rewards_digest(self._rewarding),
                describe_optimizer(self.optimizer, self.lr_scheduler, self.optimizer_cls_and_kwargs),
            )
        return describe_run(self, self._fixed)

    @property
    def computes_reference(self) -> bool:
        """Whether the reference's log-probabilities were computed before training."""
        return False

    @property
    def states_hold_reference(self) -> bool:
        """Whether the reference moves, so that checkpoints hold it."""
        return False
