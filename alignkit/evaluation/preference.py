"""Held-out preferences: loss, reward accuracy and margin, each with a 95 % interval, and what length alone would score.

Ties count as half. An untrained adapter gives every completion the reward 0, so its accuracy is 0.5 and not 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignkit.errors import DataError
from alignkit.evaluation.calibration import Calibration, calibrate
from alignkit.evaluation.estimates import (
    Estimate,
    accuracy_interval,
    as_floats,
    difference_interval,
    mean_interval,
    ranking_interval,
    wins,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from alignkit.trainers.dpo import DPOTrainer
    from alignkit.trainers.reward import RewardTrainer

__all__ = [
    "Estimate",
    "PreferenceSummary",
    "accuracy_interval",
    "difference_interval",
    "mean_interval",
    "ranking_interval",
    "summarize_labelled",
    "summarize_pairs",
    "summarize_preferences",
    "summarize_rewards",
]


@dataclass(frozen=True, slots=True)
class PreferenceSummary:
    """Scores of a policy on held-out preferences.

    Attributes:
        rows: pairs; for unpaired rows (KTO), single completions.
        ties: pairs whose two rewards are equal.
        is_paired: whether rows are pairs.
        loss: mean of the training loss.
        accuracy: share of pairs whose chosen completion has the higher reward. For unpaired rows, the probability that
            a desirable completion has a higher reward than an undesirable one (the area under the ROC curve).
        margin: mean reward of chosen (desirable) minus rejected (undesirable) completions.
        shorter: the accuracy of "the shorter completion is better" on the same rows, lengths in tokens.
        calibration: of the chance σ(margin) that the policy gives the chosen completion; `None` for unpaired rows.
    """

    rows: int
    ties: int
    is_paired: bool
    loss: float
    accuracy: Estimate
    margin: Estimate
    shorter: Estimate
    calibration: Calibration | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        estimates = {"accuracy": self.accuracy, "margin": self.margin, "shorter": self.shorter}
        counts = {"rows": self.rows, "ties": self.ties, "is_paired": self.is_paired, "loss": self.loss}
        plain = {**counts, **{name: estimate._asdict() for name, estimate in estimates.items()}}
        return plain if self.calibration is None else {**plain, "calibration": self.calibration.as_dict()}


def summarize_pairs(
    loss: float,
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
) -> PreferenceSummary:
    """Summarize pairs from their rewards and completion lengths, each `(N,)`."""
    margins = as_floats(chosen_rewards) - as_floats(rejected_rewards)
    extra_tokens = as_floats(rejected_tokens) - as_floats(chosen_tokens)
    return PreferenceSummary(
        rows=len(margins),
        ties=int((margins == 0).sum()),
        is_paired=True,
        loss=loss,
        accuracy=accuracy_interval(wins(margins), len(margins)),
        margin=mean_interval(margins),
        shorter=accuracy_interval(wins(extra_tokens), len(extra_tokens)),
        calibration=calibrate(margins),
    )


def summarize_labelled(loss: float, rewards: ArrayLike, labels: ArrayLike, tokens: ArrayLike) -> PreferenceSummary:
    """Summarize unpaired rows from their rewards, labels (True = desirable) and completion lengths, each `(N,)`.

    Raises:
        DataError: the rows are all of one kind.
    """
    values, lengths, good = as_floats(rewards), as_floats(tokens), np.asarray(labels, dtype=bool)
    if good.all() or not good.any():
        raise DataError(
            "held-out rows are all labelled the same, so nothing can be ranked: hold out rows of both kinds."
        )
    return PreferenceSummary(
        rows=len(values),
        ties=0 if len(np.unique(values)) > 1 else len(values),
        is_paired=False,
        loss=loss,
        accuracy=ranking_interval(values[good], values[~good]),
        margin=difference_interval(values[good], values[~good]),
        shorter=ranking_interval(-lengths[good], -lengths[~good]),
    )


def summarize_preferences(trainer: DPOTrainer, dataset: Dataset | IterableDataset) -> PreferenceSummary:
    """Score `dataset` with the trainer's policy as it is now, on all processes together.

    Args:
        trainer: it predicts; its loss is reported.
        dataset: prepared rows, such as `trainer.eval_dataset` or a selection of it.

    Raises:
        DataError: the rows are not prepared, or all labelled the same.
    """
    lengths = _completion_tokens(dataset)
    output: Any = trainer.predict(dataset)
    chosen, rejected = output.predictions
    loss = output.metrics["test_loss"]
    if trainer.objective.is_unpaired:
        return summarize_labelled(loss, chosen, output.label_ids, lengths[:, 0])
    return summarize_pairs(loss, chosen, rejected, lengths[:, 0], lengths[:, 1])


def summarize_rewards(trainer: RewardTrainer, dataset: Dataset | IterableDataset) -> PreferenceSummary:
    """Score `dataset` with the trainer's reward model as it is now; several heads count with their mean.

    Args:
        trainer: it predicts; its loss is reported.
        dataset: prepared rows, such as `trainer.eval_dataset` or a selection of it.

    Raises:
        DataError: the rows are not prepared.
    """
    lengths = _completion_tokens(dataset)
    output: Any = trainer.predict(dataset)
    chosen, rejected = (rewards.mean(axis=1) for rewards in output.predictions)
    return summarize_pairs(output.metrics["test_loss"], chosen, rejected, lengths[:, 0], lengths[:, 1])


def _completion_tokens(dataset: Dataset | IterableDataset) -> NDArray[np.int64]:
    """Lengths of both completions of each row, `(N, 2)`."""
    columns: Iterable[str] = dataset.column_names or next(iter(dataset), {})
    if "chosen_ids" not in columns:
        raise DataError(
            f"rows with the columns {list(columns)} are not prepared: pass trainer.eval_dataset, or what "
            "prepare_preferences returns."
        )
    rows: Any = dataset.select_columns(["chosen_ids", "rejected_ids"])
    return np.array([(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows])
