"""How trainers save and resume: whole checkpoints or none, verified, and bit for bit where they went on from.

A trainer's `train` finds the newest checkpoint that verifies, holds its output directory against other writers, and
turns SIGTERM and SIGINT into a save. What a checkpoint holds besides Trainer's files is in `trainer.states`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, has_length

from alignkit.checkpoint.adapters import check_whole, load_adapters
from alignkit.checkpoint.atomic import tidy
from alignkit.checkpoint.contents import as_checkpoint_errors, check_contents, check_weights
from alignkit.checkpoint.find import checkpoint_folders, newest_verified, saves_after
from alignkit.checkpoint.lock import sole_writer
from alignkit.checkpoint.manifest import MANIFEST, read_manifest
from alignkit.checkpoint.space import require_space
from alignkit.checkpoint.states import Stateful, States, read_states
from alignkit.errors import CheckpointError
from alignkit.models.reference_sync import load_synced_reference
from alignkit.trainers.boundary import Boundary, random_states, set_random_states
from alignkit.trainers.boundary_callback import ExportedState, KeepBoundaries, Rest
from alignkit.trainers.outsiders import Outsiders
from alignkit.trainers.resuming import agreed, check_kind, compare_runs, find_checkpoint, is_weights_only
from alignkit.trainers.saving import SavesWhole
from alignkit.trainers.signals import EXIT_RESUMABLE, Interrupted, SignalWatch
from alignkit.trainers.stream_place import StreamPlace

logger = logging.getLogger(__name__)

LOOKED_AT_STEPS = 10  # at the beginning, so that a reward that cannot be saved ends a run at once


class KeepsCheckpoints(SavesWhole):
    """What replaces the ways in which `Trainer` saves and resumes. It stands before `Trainer` among the parents.

    Attributes:
        boundary: the state before the open optimizer step, besides weights and optimizer.
    """

    args: Any
    lr_scheduler: Any
    boundary: Boundary | None
    _throughput: Any
    _signals: SignalWatch
    _outsiders: Outsiders
    _resumable: tuple[Boundary, Rest] | None
    _loaded: tuple[str, dict[str, Any]] | None
    _random_after_rest: tuple[Any, ...] | None
    _is_in_step: bool
    _rest_before: Rest
    _place: StreamPlace | None

    def begin_checkpoints(
        self,
        running: dict[str, Stateful],
        settled: dict[str, Stateful] | None = None,
        *,
        rewards: Sequence[Any] = (),
        texts: Any = None,
    ) -> None:
        """Set up, once the trainer's callbacks are there.

        Args:
            running: what changes within an optimizer step, by name: logging windows.
            settled: what changes between optimizer steps alone.
            rewards: what rewards completions; a resumed run has to have the same.
            texts: data besides the training data, the same.
        """
        self._rewarding, self._mixed_in = rewards, texts
        self.states = States()
        for name, stateful in (settled or {}).items():
            self.states.register(name, stateful)
        for name, stateful in running.items():
            self.states.register_running(name, stateful)
        self._place = None if has_length(self.train_dataset) else StreamPlace()
        if self._place is not None:
            self.states.register("stream", self._place)
        self.boundary = self._resumable = self._loaded = self._random_after_rest = None
        self.is_scheduled, self._is_in_step, self._rest_before = True, False, Rest()
        self._signals = SignalWatch(raises_at_once=self.accelerator.num_processes == 1)
        self.add_callback(KeepBoundaries(self))

    def register_callbacks(self) -> None:
        """Put every callback with state into the registry."""
        counts: dict[str, int] = {}
        for callback in self.callback_handler.callbacks:
            stateful = ExportedState(callback) if isinstance(callback, ExportableState) else callback
            if not isinstance(stateful, Stateful):
                continue
            kind = type(callback).__name__
            counts[kind] = counts.get(kind, 0) + 1
            name = f"callback/{kind}" + ("" if counts[kind] == 1 else f"/{counts[kind]}")
            self.states.replace_running(name, stateful)

    def outside_rewards(self) -> dict[str, Any]:
        """Objects of the user's that make what is trained on, by name."""
        return {}

    def _watch_outsiders(self) -> None:
        own = ("transformers.", "alignkit.")
        theirs = [each for each in self.callback_handler.callbacks if not type(each).__module__.startswith(own)]
        callbacks = {type(each).__name__: each for each in theirs if not isinstance(each, ExportableState)}
        self._outsiders = Outsiders(self.states, self.outside_rewards(), callbacks)

    # --- training ---

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in `output_dir` that verifies; "auto" for the same
                if there is one, and a new start otherwise; or a path. By default what the options say.
            **kwargs: as for `Trainer`.

        Raises:
            CheckpointError: no checkpoint verifies, it is of another run, another process writes into `output_dir`, or
                there is no room for a checkpoint; before any forward pass.
            SystemExit: with code 75, after SIGTERM or SIGINT: what was trained is saved, and a resume loses nothing.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self._throughput.reset()
        output_dir = Path(str(self.args.output_dir))
        alone = sole_writer(output_dir) if self.is_world_process_zero() else contextlib.nullcontext()
        with self._signals.listening(), alone:
            try:
                folder = self._open_checkpoint(False if resume_from_checkpoint is None else resume_from_checkpoint)
                return super().train(folder, **kwargs)
            except Interrupted as interruption:
                raise SystemExit(self._leave(interruption)) from None

    def _open_checkpoint(self, asked: str | bool) -> str | None:
        """Find the checkpoint to resume from, compare it with this run, and load the states that it holds."""
        args, output_dir = self.args, Path(str(self.args.output_dir))
        self.register_callbacks()
        self._watch_outsiders()
        self.boundary = self._resumable = self._loaded = self._saved = None
        self.is_scheduled = True  # an earlier training may have been stopped by a signal
        if self.is_world_process_zero():
            tidy(output_dir)
        weights_only: bool = args.weights_only_resume
        description = self._description()
        folder = agreed(
            lambda: find_checkpoint(asked, output_dir, weights_only=weights_only), self.is_world_process_zero()
        )
        self._others = saves_after(output_dir, folder)
        if folder is None and checkpoint_folders(output_dir) and args.save_strategy != "no":
            logger.warning(
                "%s holds checkpoints of an earlier run, which save_total_limit counts. To go on with that run, set "
                "resume_from_checkpoint='auto'.",
                output_dir,
            )
        if folder is not None and weights_only:
            step = check_weights(folder)
            if (folder / MANIFEST).exists():
                check_kind(folder, read_manifest(folder).run, description)
            self.check_resumable(folder, step)
        elif folder is not None:
            check_contents(folder)
            self._load_states(folder, description)
        if args.save_strategy != "no" and self.is_world_process_zero():
            require_space(output_dir, self._checkpoint_bytes(), "a checkpoint")
        return None if folder is None else str(folder)

    def _load_states(self, folder: Path, description: dict[str, Any]) -> None:
        manifest = read_manifest(folder)
        if is_weights_only(manifest):
            raise CheckpointError(
                f"{folder} holds weights alone (save_only_model=True): set weights_only_resume=True to go on from them "
                "with a new optimizer"
            )
        compare_runs(folder, manifest.run, description)
        self.check_resumable(folder, manifest.step)
        path = folder / f"states_{self.args.process_index}.safetensors"
        saved = read_states(path)
        self.states.load_state_dict(saved["states"], str(path))
        self._loaded = str(folder), saved["trainer"]

    def check_resumable(self, folder: Path, step: int) -> None:
        """Raise `CheckpointError` if a run cannot go on from its own checkpoint of this step."""

    # --- between steps; called by `KeepBoundaries` ---

    def begin_training(self) -> None:
        """Set what Trainer has just reset to what the checkpoint says, and make up for what it still owed."""
        loaded, self._loaded = self._loaded, None
        self._is_in_step = False
        if loaded is not None:
            folder, saved = loaded
            self._tr_loss += saved["loss"].to(self._tr_loss)
            self._total_loss_scalar, self._globalstep_last_logged = saved["total_loss"], saved["last_logged_step"]
            self._initial_global_step = saved["first_step"]
            self.state.compute_steps(self.args, self.state.max_steps)  # Trainer keeps the intervals of the run before
            with as_checkpoint_errors(Path(folder)):
                super()._load_rng_state(folder)
            self.place_best(Path(str(self.args.output_dir)))
            self._make_up(Rest(**saved["rest"]), saved["max_steps"])
            self._random_after_rest = random_states()
        self._resumable = Boundary.take(self), Rest()

    def _make_up(self, rest: Rest, max_steps_before: int) -> None:
        """Log, evaluate and save what the run had still to do at its last step when it was stopped."""
        step = self.state.global_step
        was_over = step >= max_steps_before and step < self.state.max_steps  # but this run is longer
        self.control.should_training_stop = rest.is_stopped and not was_over
        self.control.should_log, self.control.should_evaluate = rest.log, rest.evaluate
        self.control.should_save = rest.save
        self._is_in_step = rest.in_step
        self._after_step(rest)
        if rest.in_step and self._epoch_ends():
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._after_step(rest)

    def _after_step(self, rest: Rest) -> None:
        model, epoch = self.model_wrapped, self.state.epoch
        sums = self._tr_loss, rest.grad_norm, model, None, epoch, None, time.time()
        self._maybe_log_save_evaluate(*sums, learning_rate=rest.learning_rate)

    def begin_step(self) -> None:
        """Copy the state that an open step can be taken back to."""
        self._is_in_step = True
        self.boundary = Boundary.take(self)

    def begin_update(self) -> None:
        """From here until the step is over, weights and counters move together."""
        self._signals.protect()

    def end_epoch(self) -> None:
        """What follows is the epoch's own log entry, evaluation and checkpoint."""
        self._is_in_step, self.is_scheduled = False, True

    def _epoch_ends(self) -> bool:
        """Whether Trainer will say that the epoch has ended before it makes another step."""
        epoch = self.state.epoch or 0.0
        return epoch == int(epoch) or self.control.should_training_stop or self.control.should_epoch_stop

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        grad_norm, rate = args[1], kwargs.get("learning_rate")
        self._rest_before = Rest.of(self.control, grad_norm, rate, in_step=self._is_in_step)
        self._resumable = Boundary.take(self), self._rest_before
        self._signals.release()
        if self.args.save_strategy != "no" and (self.control.should_save or self.state.global_step <= LOOKED_AT_STEPS):
            self._outsiders.check()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._resumable = Boundary.take(self), self._rest()
        self._agree_to_stop()

    def _rest(self) -> Rest:
        """What the run owes once the step is logged, evaluated and saved: the end of its epoch, if it has come."""
        found = Rest(is_stopped=self.control.should_training_stop)
        if not (self._is_in_step and self._epoch_ends()):
            return found
        before = self._rest_before
        return replace(found, in_step=True, grad_norm=before.grad_norm, learning_rate=before.learning_rate)

    def _agree_to_stop(self) -> None:
        """With several processes: stop all of them, if any was asked to."""
        if self.accelerator.num_processes == 1:
            return
        received = self._signals.received
        count: Any = torch.tensor(int(received is not None), device=self.args.device)
        if bool(self.accelerator.reduce(count, reduction="sum")):
            raise Interrupted(received or signal.SIGTERM)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step:  # `eval_on_start`, and a resumed run has started long ago
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop:  # a resumed run that had ended already
            return
        if self._place is not None:
            is_known = kwargs["resume_from_checkpoint"] is not None and not self.args.weights_only_resume
            accumulation = self.args.gradient_accumulation_steps
            kwargs = self._place.enter(kwargs, self.state.global_step, accumulation, is_known=is_known)
        super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random_after_rest is not None:
            set_random_states(self._random_after_rest)
            self._random_after_rest = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.args.weights_only_resume:
            with as_checkpoint_errors(Path(str(checkpoint))):
                super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            is_lost = self.states_hold_reference and self.bundle.reference is not None
            lost = "the moving reference, " if is_lost else ""
            logger.warning("weights_only_resume: %soptimizer, random numbers and logging windows begin anew.", lost)
            if isinstance(self.lr_scheduler, ReduceLROnPlateau | GreedyLR):
                return  # it follows evaluations, which begin anew too
            steps = min(self.state.global_step, self.state.max_steps)  # a run that is over needs no schedule
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                for _ in range(steps):  # the schedule alone is a function of the step
                    self.lr_scheduler.step()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with as_checkpoint_errors(folder):
            if isinstance(self.model, PeftModel) and not self._is_sharded:
                load_adapters(self.model, folder)
            else:
                if not isinstance(self.model, PeftModel):
                    check_whole(folder)
                self._reshard()
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_sharded_reference(folder)

    def _reshard(self) -> None:
        """Let go of weights that FSDP2 has put together for an evaluation: nothing can be loaded into those."""
        for module in self.bundle.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _load_sharded_reference(self, folder: Path) -> None:
        if self.is_fsdp_enabled and self.states_hold_reference:
            load_synced_reference(self.bundle.model, folder)

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if best.is_dir():
            check_weights(best)
        self._resumable = None  # weights are no longer those of the last step: a signal finds what was saved before
        with as_checkpoint_errors(best):
            if isinstance(self.model, PeftModel) and best.is_dir() and not self._is_sharded:
                # Trainer finds one adapter alone, and that by the name "default".
                load_adapters(self.model, best)
            else:
                self._reshard()
                super()._load_best_model()
                self._load_sharded_reference(best)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # With a limit of 1, Trainer would remove every checkpoint but the best: the newest, and those that others made.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self.args.weights_only_resume:
            super()._load_scaler(checkpoint)

    # --- saving and stopping ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        with self._signals.protected():
            rest = self._rest()
            target = self._write_checkpoint(run_dir, rest)
            self._resumable = Boundary.take(self), rest  # what came before it is not made up for a second time
        if self.args.push_to_hub and self.is_scheduled:
            self._push_from_checkpoint(str(target))

    def _leave(self, interruption: Interrupted) -> int:
        """Save the last moment between two steps, and return the exit code."""
        self._signals.protect()  # for good: the process ends, and a second SIGINT alone is heard
        step = self.state.global_step
        if self._resumable is not None:
            boundary, rest = self._resumable
            boundary.restore(self)
            step = self.state.global_step
            self.is_scheduled = False
            if step and self._saved != (step, rest) and self.can_save_now(step):
                self._write_checkpoint(self._get_output_dir(None), rest)
        main = self.is_world_process_zero()
        found = newest_verified(Path(str(self.args.output_dir))).folder if main else None
        told = f"{found} is whole; go on with resume_from_checkpoint='auto'." if found else "Nothing was saved yet."
        logger.warning("%s: stopped after step %d. %s", interruption.name, step, told)
        return EXIT_RESUMABLE

    def can_save_now(self, step: int) -> bool:
        """Whether a checkpoint of this step could be resumed from."""
        return True
