"""What a logging window of a reward model says: TRL's metrics, their uncertainty, and how far an ensemble agrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.functional.intervals import wilson_interval
from alignkit.functional.reward import ensemble
from alignkit.functional.statistics import calibration_error

CALIBRATION_BINS = 10


class RewardRows(NamedTuple):
    """Rewards of N pairs, `(N,)` each: mean, minimum and spread over the heads, of both completions."""

    chosen: Tensor
    rejected: Tensor
    chosen_minimum: Tensor
    rejected_minimum: Tensor
    chosen_spread: Tensor
    rejected_spread: Tensor

    @property
    def margins(self) -> Tensor:
        """Mean rewards of chosen minus rejected completions."""
        return self.chosen - self.rejected


class RewardWindow:
    """The pairs since the last `means()`.

    Args:
        summaries: what is made of them.
    """

    def __init__(self, *summaries: Callable[[RewardRows], dict[str, float]]) -> None:
        self._summaries = summaries
        self._rows: list[Tensor] = []

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add the rewards of a batch of pairs, `(B, K)` each."""
        first, second = ensemble(chosen.detach().double()), ensemble(rejected.detach().double())
        both = [column for pair in zip(first, second, strict=True) for column in pair]
        self._rows.append(torch.stack([*both, torch.ones_like(both[0])], dim=1))  # (B, 7); the ones mark real rows

    def state_dict(self) -> dict[str, Any]:
        """Return the open window."""
        return {"rows": list(self._rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the open window to what `state_dict` returned."""
        self._rows = list(state_dict["rows"])

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics of the pairs of all processes, and start a new window."""
        if not self._rows:
            return {}
        mine = torch.cat([rows.to(accelerator.device) for rows in self._rows])
        self._rows = []
        padded = accelerator.pad_across_processes(mine, dim=0)  # with zeros
        rows = cast(Tensor, accelerator.gather(padded)).cpu()
        real = RewardRows(*rows[rows[:, -1] == 1, :-1].unbind(1))
        return {name: value for summary in self._summaries for name, value in summary(real).items()}


def reward_metrics(rows: RewardRows) -> dict[str, float]:
    """TRL's metrics. Minimum and maximum are those of the window; TRL averages those of its batches."""
    rewards = torch.cat([rows.chosen, rows.rejected])
    return {
        "accuracy": (rows.margins > 0).double().mean().item(),
        "margin": rows.margins.mean().item(),
        "mean_reward": rewards.mean().item(),
        "min_reward": rewards.min().item(),
        "max_reward": rewards.max().item(),
    }


def uncertainty_metrics(rows: RewardRows) -> dict[str, float]:
    """The 95 % interval of the accuracy, and the calibration error of the stated chances `σ(margin)`."""
    low, high = wilson_interval(int((rows.margins > 0).sum()), len(rows.margins))
    chances = torch.sigmoid(rows.margins.abs())  # of the side that the model prefers
    error = calibration_error(chances, rows.margins > 0, CALIBRATION_BINS)
    return {"accuracy_low": low, "accuracy_high": high, "calibration_error": error.item()}


def ensemble_metrics(rows: RewardRows) -> dict[str, float]:
    """How far the heads agree: their standard deviation on a completion, and what their minimum would say."""
    minima = torch.cat([rows.chosen_minimum, rows.rejected_minimum])
    return {
        "ensemble/std": torch.cat([rows.chosen_spread, rows.rejected_spread]).mean().item(),
        "ensemble/minimum_reward": minima.mean().item(),
        "ensemble/minimum_accuracy": (rows.chosen_minimum > rows.rejected_minimum).double().mean().item(),
    }
