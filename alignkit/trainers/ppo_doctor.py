"""The PPO doctor: says in plain words what is going wrong in a run and which setting to change, and may act on it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from alignkit.errors import ConfigError, nearest
from alignkit.trainers.ppo_callbacks import PPOCallback, steps_per_rollout
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_diagnosis import Finding, diagnose

logger = logging.getLogger(__name__)

Act = Literal["warn", "lower_rate", "stop", "rollback"]
# What the doctor may do, and the findings' own actions that justify it.
_JUSTIFIED_BY: dict[Act, tuple[str, ...]] = {
    "warn": (),
    "lower_rate": ("lower_rate", "stop"),
    "stop": ("stop",),
    "rollback": ("stop",),
}


class Record(NamedTuple):
    """Metrics of one rollout, or of several that were logged together.

    Attributes:
        begin: steps done when its first completion may have been generated.
        metrics: as logged, `step` included.
    """

    begin: int
    metrics: dict[str, float]


class PPODoctor(PPOCallback):
    """Log each problem that `diagnose` finds, once; again only if it went away in between.

    Everything comes from the run's log, which Trainer saves with each checkpoint: the doctor has no state of its own,
    and a resumed run goes on as if it had never stopped. A rollout is looked at when its last step has been logged.

    Args:
        act: what it may do besides. "lower_rate" multiplies the learning rate by `rate_factor` for each new finding
            that asks for it or for more; "stop" ends training at a finding that no setting can mend in the same run;
            "rollback" does so too and names the last good checkpoint, from which training can be resumed.
        rate_factor: between 0 and 1.

    Raises:
        ConfigError: an unknown `act`, or a factor out of range.
    """

    def __init__(self, act: Act = "warn", rate_factor: float = 0.5) -> None:
        if act not in get_args(Act):
            raise ConfigError(
                f"PPODoctor(act={act!r}): must be one of {', '.join(get_args(Act))}.{nearest(act, get_args(Act))}"
            )
        if not 0 < rate_factor < 1:
            raise ConfigError(f"PPODoctor(rate_factor={rate_factor!r}): must lie between 0 and 1")
        self.act: Act = act
        self.rate_factor = rate_factor

    def on_log(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not _is_of_training(logs or {}):
            return
        entries = [entry for entry in state.log_history if _is_of_training(entry)]
        records = finished_records(entries, args)
        known = {finding.name for finding in _diagnosed(finished_records(entries[:-1], args))}
        new = [finding for finding in _diagnosed(records) if finding.name not in known]
        for finding in new:
            self._report(finding, args, state)
        grave = [finding for finding in new if finding.action in _JUSTIFIED_BY[self.act]]
        if not grave:
            return
        if self.act == "lower_rate":
            for _ in grave:
                lower_rate(kwargs["optimizer"], kwargs["lr_scheduler"], self.rate_factor)
            _say(state, f"the learning rate was multiplied by {self.rate_factor ** len(grave):g}.")
        else:
            control.should_training_stop = True
            _say(state, f"training stops at step {state.global_step}.")
        if self.act == "rollback":
            _say(state, _way_back(Path(str(args.output_dir)), records, grave))

    def _report(self, finding: Finding, args: PPOConfig, state: TrainerState) -> None:
        _say(
            state,
            f"{finding.name} at step {state.global_step}: {finding.evidence}. {finding.explanation} "
            f"Change {finding.remedy} Now: {_current_settings(finding.remedy, args)}.",
        )


def finished_records(entries: Sequence[Mapping[str, float]], args: PPOConfig) -> list[Record]:
    """Return the records of rollouts after critic warm-up whose last step has been logged.

    A log may hold several rollouts, or a rollout fill several logs; then the last value of each metric counts, which is
    that of the last steps, when the policy has moved furthest.

    Args:
        entries: of the run's log, of training alone.
        args: of the run.
    """
    per_rollout = steps_per_rollout(args)
    records: list[Record] = []
    before = 0
    for entry in entries:
        if "objective/kl" in entry:
            records.append(Record(before, dict(entry)))
        elif records:
            records[-1].metrics.update(entry)
        before = int(entry["step"])
    if before % per_rollout:
        records = records[:-1]
    return [record for record in records if record.begin >= args.critic_warmup_rollouts * per_rollout]


def lower_rate(optimizer: Optimizer, scheduler: LRScheduler, factor: float) -> None:
    """Multiply every learning rate by `factor`, now and for the rest of the schedule.

    Optimizer and scheduler save the numbers that change, so a resumed run has them.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
        if "initial_lr" in group:
            group["initial_lr"] = group["initial_lr"] * factor
    if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):  # it goes on from "lr"
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def last_checkpoint_before(folder: Path, step: int) -> Path | None:
    """Return the newest whole checkpoint in `folder` that was saved before `step`, if there is one."""
    found = {
        int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)
        and (path / TRAINER_STATE_NAME).is_file()  # written last
    }
    earlier = [number for number in found if number < step]
    return found[max(earlier)] if earlier else None


def _diagnosed(records: Sequence[Record]) -> list[Finding]:
    return diagnose([record.metrics for record in records])


def _is_of_training(entry: Mapping[str, float]) -> bool:
    return "loss" in entry or "objective/kl" in entry  # those of evaluations have a prefix


def _way_back(folder: Path, records: Sequence[Record], grave: Sequence[Finding]) -> str:
    # The weights at a bad rollout's begin wrote its completions, so a checkpoint of that very step is not good either.
    begin = min(records[-finding.rollouts].begin for finding in grave)
    checkpoint = last_checkpoint_before(folder, begin)
    if checkpoint is None:
        return (
            f"no checkpoint in {folder} is older than the first bad rollout, which began at step {begin}. Start anew "
            "with other settings, and save more often."
        )
    return (
        f"the last good checkpoint is {checkpoint}; the first bad rollout began at step {begin}. Change the settings "
        f"above and go on with trainer.train(resume_from_checkpoint='{checkpoint}')."
    )


def _current_settings(remedy: str, args: PPOConfig) -> str:
    """Return the values of the options that a remedy names."""
    named = set(re.findall(r"\w+", remedy)) & {option.name for option in fields(args)}
    return ", ".join(f"{name}={vars(args)[name]!r}" for name in sorted(named))


def _say(state: TrainerState, text: str) -> None:
    if state.is_world_process_zero:
        logger.warning("PPO doctor: %s", text)
