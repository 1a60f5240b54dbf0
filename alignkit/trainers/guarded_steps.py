"""Steps under guard: left out where a number is not finite, made in smaller passes where memory is short."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from alignkit.checkpoint.find import newest_verified
from alignkit.checkpoint.states import Stateful, States
from alignkit.errors import TrainingError
from alignkit.trainers.callbacks_engine import PauseScaler
from alignkit.trainers.config_engine import EngineConfig
from alignkit.trainers.guards import MOST_NAMED, ROW_ID, FiniteGuard, SkippedStep, few, listed, not_finite_weights
from alignkit.trainers.longest_batch import Trial, try_longest_batch
from alignkit.trainers.passes import Batch, accumulate

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


def _never() -> bool:
    return False


def _nothing() -> None:
    pass


def _ignore(loss: Tensor) -> None:
    pass


class GuardsSteps(_Base):
    """Looks at every optimizer step before it is made. It stands before `Trainer` among the parents.

    Attributes:
        guard: what it saw.
    """

    guard: FiniteGuard
    args: EngineConfig
    model: Any
    model_wrapped: Any
    boundary: Any
    states: States
    reports: Any
    _passes: Any
    _description: Callable[[], dict[str, Any]]
    _forget_minibatch: Callable[[], None]
    _micro_batches: list[Any]
    _scaler: PauseScaler

    def begin_guards(
        self,
        is_skipped: Callable[[], bool] = _never,
        forget_minibatch: Callable[[], None] = _nothing,
        engine: Any = None,
    ) -> None:
        """Set up; the last thing that a trainer's constructor does, once there are `states`.

        Args:
            is_skipped: whether the step that begins will have no gradients.
            forget_minibatch: drops what the open step has left besides registered states.
            engine: that writes completions; one that finds out what memory holds has that for a state.
        """
        self.guard, self._micro_batches = FiniteGuard(self.accelerator), []
        self._forget_minibatch = forget_minibatch
        self._scaler = PauseScaler(self.accelerator, is_skipped)
        self.states.register("bad_steps", self.guard)
        self.states.register("token_budget", self._passes.memory)
        if isinstance(engine, Stateful):
            self.states.register("rollout_engine", engine)
        for callback in (self._scaler, GuardCallback(self)):
            self.add_callback(callback)

    def trials(self) -> list[Trial]:
        """What the longest passes of training are made of."""
        raise NotImplementedError

    def run_micro_batch(
        self,
        inputs: Batch,
        chunks: Callable[[Batch], list[Batch]],
        step: Callable[[Batch], Tensor],
        finish: Callable[[Tensor], None] = _ignore,
    ) -> Tensor:
        """Return the loss of a micro-batch; where it takes too much memory, run the whole step so far anew.

        Args:
            inputs: the micro-batch.
            chunks: cuts it by the token budget of the moment.
            step: a chunk's forward and backward pass.
            finish: is told the micro-batch's loss.

        Raises:
            TrainingError: it does not fit in any way.
        """
        self._micro_batches.append(inputs)
        todo = [inputs]

        def put_back() -> None:
            seen, flos, loss = self.state.num_input_tokens_seen, self.current_flos, self._tr_loss.clone()
            self.boundary.restore(self)
            # What Trainer has counted of the step so far will be right once it has been run again.
            self.state.num_input_tokens_seen, self.current_flos = seen, flos
            self._tr_loss.copy_(loss)
            self.guard.begin_step()
            self._forget_minibatch()
            todo[:] = self._micro_batches

        def run(batch: Batch) -> Tensor:
            loss = accumulate(step, chunks(batch), self.model_wrapped, self.accelerator, self.args)
            self.guard.look(batch, {"loss": loss})
            finish(loss)
            return loss

        return self._passes.memory.fit(lambda: [run(batch) for batch in todo][-1], put_back)

    def evaluate_in_chunks(
        self, chunks: Callable[[], list[Batch]], compute_loss: Callable[..., Any], window: Stateful | None = None
    ) -> list[Any]:
        """Return what `compute_loss` returns besides the loss for each chunk, without gradients.

        Args:
            chunks: cuts a batch by the token budget of the moment.
            compute_loss: takes a chunk.
            window: what it writes to, put back before a second attempt.
        """
        before = {} if window is None else window.state_dict()

        def put_back() -> None:
            if window is not None:
                window.load_state_dict(copy.deepcopy(before))

        with torch.no_grad(), self.compute_loss_context_manager():
            return self._passes.memory.fit(
                lambda: [compute_loss(chunk, return_outputs=True)[1] for chunk in chunks()], put_back
            )

    def begin_guarded_step(self) -> None:
        """Forget the step before."""
        self._micro_batches = []
        self.guard.begin_step()

    def check_step(self) -> None:
        """Look at a step whose gradients are complete; leave it out if it is bad.

        Raises:
            TrainingError: there were too many of them, or no step can help any more.
        """
        if self.guard.is_resting:
            self._leave_out()
            return
        bad = self.guard.bad_quantities()
        if not bad:
            return
        rows = self.guard.bad_rows()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # it moves weights within backward
            raise TrainingError(
                f"step {self.state.global_step + 1}: {listed(bad)} not finite ({self.name_rows(rows)}), and DeepSpeed "
                f"has used its gradients already. {self._where_to_go_on()}"
            )
        self.boundary.restore(self)
        self._forget_minibatch()
        self._scaler.pause(self.optimizer)
        self._leave_out()
        self.count_bad_step(bad, rows)

    def count_bad_step(self, bad: Sequence[str], rows: list[int], steps: int = 1) -> None:
        """Say what was bad about the next step, or about the rollout of as many, and count it as one.

        Raises:
            TrainingError: that was one too many, or the weights are what is not finite.
        """
        guard, most = self.guard, self.args.max_skipped_steps
        step = self.state.global_step + 1
        guard.skipped.append(SkippedStep(step, list(bad), rows))
        weights = not_finite_weights(self.model)
        if weights:
            raise TrainingError(
                f"step {step}: {listed(bad)} not finite because weights are not: {few(weights)}. No step can repair "
                f"that. {self._where_to_go_on()}"
            )
        if len(guard.skipped) > most:
            told = "; ".join(
                f"step {each.step}: {listed(each.quantities)} not finite ({self.name_rows(each.rows)})"
                for each in guard.skipped
            )
            raise TrainingError(
                f"{len(guard.skipped)} bad steps, more than max_skipped_steps={most} allows. {told}. None of them has "
                f"moved a weight. Look at these rows, lower learning_rate, or raise max_skipped_steps. "
                f"{self._where_to_go_on()}"
            )
        if self.is_world_process_zero():
            logger.warning(
                "%s left out: %s not finite (%s). No weight has moved. That is number %d of the %d that "
                "max_skipped_steps allows.",
                f"step {step} is" if steps == 1 else f"steps {step} to {step + steps - 1} are",
                listed(bad),
                self.name_rows(rows),
                len(guard.skipped),
                most,
            )

    def name_rows(self, rows: Sequence[int]) -> str:
        """Say which rows of the training data these are, as given and, where that differs, as prepared."""
        if not rows:
            return "rows unknown: the data collator passes no row_id on"
        text = f"rows {few(rows)} of the training data"
        dataset = self.train_dataset
        if isinstance(dataset, Dataset) and ROW_ID in dataset.column_names and self.reports["train"].rows_dropped:
            wanted = set(rows[:MOST_NAMED])
            places = [place for place, row in enumerate(dataset[ROW_ID]) if row in wanted]
            text += f", {few(places)} of those that were kept"
        return text

    def _leave_out(self) -> None:
        """Count the open step, which moves nothing, and leave it out of the means of losses."""
        self.guard.steps_left_out += 1
        self.guard.last_left_out = self.state.global_step + 1
        self._globalstep_last_logged += 1
        self._initial_global_step += 1

    def _where_to_go_on(self) -> str:
        folder = newest_verified(Path(str(self.args.output_dir))).folder
        if folder is None:
            return "No checkpoint was saved yet."
        return f"The last good checkpoint is {folder}: resume_from_checkpoint='{folder}'."

    # --- Trainer's own methods ---

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.guard.norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with `skipped_steps`, the run's count of steps that moved nothing, once there is one."""
        if "loss" in logs and self.guard.steps_left_out:
            logs["skipped_steps"] = self.guard.steps_left_out
            if self.guard.last_left_out == self.state.global_step:
                logs.pop("grad_norm", None)  # of a step that was not made
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and say which rows gave a number that is not finite."""
        if self.accelerator.is_fsdp2 and not self.accelerator._models:
            self._shard()
        self.guard.begin_step()
        output = super().evaluation_loop(*args, **kwargs)
        bad = self.guard.bad_quantities()
        if bad:
            rows = self.guard.bad_rows()
            if self.is_world_process_zero():
                where = f"rows {few(rows)} of the data" if rows else "rows unknown"
                logger.warning(
                    "evaluation after step %d: %s not finite (%s).", self.state.global_step, listed(bad), where
                )
        self.guard.begin_step()
        return output

    def _shard(self) -> None:
        """Shard model and optimizer before an evaluation that precedes training; Trainer's way there is an error."""
        if self.train_dataset is not None:
            self._description()  # which hashes whole weights
        self.create_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model or ""
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}", 0.0)
        # Nothing compares as better than NaN: as the best so far, it would stay so.
        return math.isfinite(value) and super()._determine_best_metric(metrics, trial)


class GuardCallback(TrainerCallback):
    """Tells a trainer that guards its steps when training and its steps begin, and when a step would move weights."""

    def __init__(self, trainer: GuardsSteps) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: EngineConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.guard.begin_run()
        try_longest_batch(self.trainer)

    def on_step_begin(self, args: EngineConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.begin_guarded_step()

    def on_pre_optimizer_step(
        self, args: EngineConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.check_step()
