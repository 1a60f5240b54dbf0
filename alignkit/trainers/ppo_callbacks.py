"""Callbacks of `PPOTrainer`: what they are called with, and those that report on a run.

Metrics that a callback adds are `Pooled` figures (`alignkit.trainers.pooled`), so that they are right over all
processes and however rollouts and logs fall together. `metrics["rewards/shouting"] = mean(shouting)` in `on_rewards` is
all that a metric of one's own takes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from alignkit.errors import ConfigError
from alignkit.functional.statistics import RunningMoments
from alignkit.rollout.collect import Rollout, TokenTable
from alignkit.rollout.mix import RewardResult
from alignkit.trainers.pooled import Pooled
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_metrics import completion_metrics, reward_metrics, shaping_metrics, value_metrics
from alignkit.trainers.ppo_samples import (
    append_rows,
    keep_rows_before,
    put_aside,
    sample_rows,
    samples_table,
    send_to_trackers,
)
from alignkit.trainers.saving import SavesWhole

logger = logging.getLogger(__name__)

PPOEvent = Literal["on_rollout_begin", "on_rewards", "on_values", "on_rollout_end", "on_minibatch_end"]
SAMPLES_FILE = "rollouts.jsonl"


class PPOCallback(TrainerCallback):
    """A `TrainerCallback` with the events of PPO, in this order: a rollout begins, is rewarded, is valued, ends; then
    its minibatches.

    `model`, `processing_class`, `optimizer` and `lr_scheduler` come with every event, and more may be added: accept
    `**kwargs`. A `control` that is returned takes effect as with Trainer's own events.
    """

    def on_rollout_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Before completions are generated. `state.global_step` steps have been done."""

    def on_rewards(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        rewards: RewardResult,
        metrics: dict[str, Pooled],
        **kwargs: Any,
    ) -> Any:
        """After completions were rewarded. What is put into `metrics` is logged."""

    def on_values(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        tokens: TokenTable,
        returns: Tensor,
        mask: Tensor,
        metrics: dict[str, Pooled],
        **kwargs: Any,
    ) -> Any:
        """After tokens were scored and returns `(B, T)` computed; the boolean mask says which count."""

    def on_rollout_end(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        rollout: Rollout,
        metrics: dict[str, Pooled],
        kl_coef: float,
        moments: RunningMoments | None,
        **kwargs: Any,
    ) -> Any:
        """After the rollout is complete.

        `metrics` holds what is logged of it, `kl_coef` the weight of the KL penalty in it, `moments` those of rewards
        if they are normalised.
        """

    def on_minibatch_end(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, Pooled],
        **kwargs: Any,
    ) -> Any:
        """After the passes of one minibatch. `metrics[name].read()` is this process's value of a metric."""


def call_event(
    handler: CallbackHandler,
    event: PPOEvent,
    args: PPOConfig,
    state: TrainerState,
    control: TrainerControl,
    **kwargs: Any,
) -> TrainerControl:
    """Call `event` on every `PPOCallback` of `handler` as the handler calls Trainer's events; on no other callback.

    Returns:
        The control that the last callback which returned one gave, else `control`.
    """
    for callback in handler.callbacks:
        if isinstance(callback, PPOCallback):
            call = methodcaller(
                event,
                args,
                state,
                control,
                model=handler.model,
                processing_class=handler.processing_class,
                optimizer=handler.optimizer,
                lr_scheduler=handler.lr_scheduler,
                train_dataloader=handler.train_dataloader,
                eval_dataloader=handler.eval_dataloader,
                **kwargs,
            )
            returned = call(callback)
            control = control if returned is None else returned
    return control


def steps_per_rollout(args: PPOConfig) -> int:
    """Optimizer steps that are made with each rollout."""
    return args.num_ppo_epochs * args.num_mini_batches


class RolloutCallback(PPOCallback):
    """Report on completions: metrics `completions/*`, and every few rollouts samples, from the main process.

    Samples are the first ones of a rollout, not chosen by anything. They go to the console as a table, to
    `rollouts.jsonl` in `output_dir` (there all completions of the rollout), and to Weights & Biases and TensorBoard
    where the run reports to them. A new run puts an earlier one's file aside, as `rollouts-1.jsonl` and so on; a
    resumed run takes out of its own file what it will make again.

    Args:
        every_rollouts: rollouts from one report to the next; the first is always reported.
        samples: how many completions are shown.
        console: where the table goes; by default standard error.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(self, every_rollouts: int = 10, samples: int = 4, console: Console | None = None) -> None:
        for name, value in (("every_rollouts", every_rollouts), ("samples", samples)):
            if value < 1:
                raise ConfigError(f"RolloutCallback({name}={value!r}): must be 1 or more")
        self.every_rollouts, self.samples = every_rollouts, samples
        self.console = console or Console(stderr=True)

    def on_train_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(str(args.output_dir)) / SAMPLES_FILE
            if not state.global_step and path.is_file():
                logger.warning("%s: an earlier run's samples are now in %s", path, put_aside(path))
            removed = keep_rows_before(path, state.global_step)
            if removed:
                logger.warning(
                    "%s: removed %d samples of an earlier run, from step %d on", path, removed, state.global_step
                )

    def on_rollout_end(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        rollout: Rollout,
        metrics: dict[str, Pooled],
        **kwargs: Any,
    ) -> None:
        metrics |= completion_metrics(rollout, processes=args.world_size)
        number = state.global_step // steps_per_rollout(args)
        if not state.is_world_process_zero or number % self.every_rollouts:
            return
        rows, folder = sample_rows(rollout, step=state.global_step, number=number), Path(str(args.output_dir))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            append_rows(folder / SAMPLES_FILE, rows)
        except OSError as error:  # people miss them; the run does not
            logger.warning("Samples of rollout %d could not be written to %s: %s", number, SAMPLES_FILE, error)
        shown = rows[: self.samples]
        self.console.print(samples_table(shown))
        send_to_trackers(shown, args.report_to or (), folder / "runs" / "samples")


class RewardCallback(PPOCallback):
    """Report on rewards: each component, dropped samples, clipping, normalisation, length, the KL coefficient."""

    def on_rewards(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        rewards: RewardResult,
        metrics: dict[str, Pooled],
        **kwargs: Any,
    ) -> None:
        metrics |= reward_metrics(rewards)

    def on_rollout_end(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        rollout: Rollout,
        metrics: dict[str, Pooled],
        kl_coef: float,
        moments: RunningMoments | None,
        **kwargs: Any,
    ) -> None:
        metrics |= shaping_metrics(rollout, kl_coef=kl_coef, moments=moments)


class ValueCallback(PPOCallback):
    """Report on the critic: its explained variance, and when its warm-up begins and ends."""

    def on_rollout_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        number, warmup = state.global_step // steps_per_rollout(args), args.critic_warmup_rollouts
        if not warmup or not state.is_world_process_zero:
            return
        if number == 0:
            logger.info("Critic warm-up: the first %d rollouts train the critic alone; the policy rests.", warmup)
        elif number == warmup:
            logger.info("Critic warm-up is over after %d rollouts: from now on the policy trains too.", warmup)

    def on_values(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        *,
        tokens: TokenTable,
        returns: Tensor,
        mask: Tensor,
        metrics: dict[str, Pooled],
        **kwargs: Any,
    ) -> None:
        if args.advantage_estimator == "gae":  # others have no critic
            metrics |= value_metrics(tokens, returns, mask)


class StopOnKL(TrainerCallback):
    """Stop training once the logged `objective/kl` exceeds a bound.

    Args:
        max_kl: in nats per completion, over all processes, on average since the last log.

    Raises:
        ConfigError: a bound that is not positive.
    """

    def __init__(self, max_kl: float) -> None:
        if not max_kl > 0:
            raise ConfigError(
                f"StopOnKL(max_kl={max_kl!r}): must be positive. The KL starts at 0; usual: 10 to 30 nats."
            )
        self.max_kl = max_kl

    def on_log(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        kl = (logs or {}).get("objective/kl")
        if kl is not None and kl > self.max_kl:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    "Training stops at step %d: objective/kl is %.1f nats, above max_kl=%g.",
                    state.global_step,
                    kl,
                    self.max_kl,
                )


def reporting_callbacks(given: Sequence[TrainerCallback | type[TrainerCallback]] = ()) -> list[PPOCallback]:
    """Return the callbacks that report on every run, but for those that the user has given, perhaps with options."""
    kinds = [each if isinstance(each, type) else type(each) for each in given]
    reports = (RolloutCallback, RewardCallback, ValueCallback)
    return [report() for report in reports if not any(issubclass(kind, report) for kind in kinds)]


class SaveBoundaries(TrainerCallback):
    """Ask for a checkpoint at the end of every rollout's steps.

    Between them a rollout is open, and a checkpoint would lack its episodes: a run that is stopped there goes on from
    the last boundary. Of the checkpoints that only this asks for, the newest alone is kept.

    Args:
        trainer: is told whether the checkpoint that comes is one that the user asked for.
    """

    def __init__(self, trainer: SavesWhole) -> None:
        self.trainer = trainer

    def on_step_end(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.is_scheduled = True
        steps = steps_per_rollout(args)
        if args.save_strategy != "no" and steps > 1 and state.global_step % steps == 0:
            self.trainer.is_scheduled = control.should_save
            control.should_save = True
