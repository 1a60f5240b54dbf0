"""Held-out preferences: loss, reward accuracy and margin, each with a 95 % interval, and what length alone would score.

Ties count as half. An untrained adapter gives every completion the reward 0, so its accuracy is 0.5 and not 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from alignkit.errors import DataError
from alignkit.functional.intervals import wilson_interval

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from alignkit.trainers.dpo import DPOTrainer
    from alignkit.trainers.reward import RewardTrainer

_CONFIDENCE = 0.95
_RESAMPLES = 2000
_BATCH_NUMBERS = 4_000_000  # resampled numbers in memory at a time
_SEED = 0


class Estimate(NamedTuple):
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float


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
    """

    rows: int
    ties: int
    is_paired: bool
    loss: float
    accuracy: Estimate
    margin: Estimate
    shorter: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            name: Estimate(*value)._asdict() if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def accuracy_interval(correct: float, total: int) -> Estimate:
    """Return the share `correct / total` with Wilson's 95 % interval (Wilson 1927, Eq. 4 in Brown et al. 2001).

    A half, from ties, widens the interval: it reaches from that of the next lower to that of the next higher count.

    Raises:
        ValueError: no rows, or more correct ones than rows.
    """
    low, _ = wilson_interval(math.floor(correct), total, _CONFIDENCE)
    _, high = wilson_interval(math.ceil(correct), total, _CONFIDENCE)
    return Estimate(correct / total, low, high)


def mean_interval(values: ArrayLike) -> Estimate:
    """Return the mean of `values` `(N,)` with a 95 % percentile bootstrap interval from a fixed seed."""
    return _bootstrap(_mean, _floats(values))


def difference_interval(high: ArrayLike, low: ArrayLike) -> Estimate:
    """Return mean(`high`) - mean(`low`) of independent samples with a 95 % percentile bootstrap interval."""
    return _bootstrap(_difference, _floats(high), _floats(low))


def ranking_interval(high: ArrayLike, low: ArrayLike) -> Estimate:
    """Return P(a value of `high` > a value of `low`), ties as half, with DeLong's 95 % interval (DeLong et al. 1988).

    Raises:
        ValueError: one of the two is empty.
    """
    above, below = _floats(high), _floats(low)
    if not len(above) or not len(below):
        raise ValueError("ranking needs values of both kinds")
    of_above = _share_below(above, below)
    of_below = 1 - _share_below(below, above)
    variance = sum(float(shares.var(ddof=1)) / len(shares) for shares in (of_above, of_below) if len(shares) > 1)
    value, reach = float(of_above.mean()), float(stats.norm.ppf((1 + _CONFIDENCE) / 2)) * math.sqrt(variance)
    return Estimate(value, max(0.0, value - reach), min(1.0, value + reach))


def summarize_pairs(
    loss: float,
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
) -> PreferenceSummary:
    """Summarize pairs from their rewards and completion lengths, each `(N,)`."""
    margins = _floats(chosen_rewards) - _floats(rejected_rewards)
    extra_tokens = _floats(rejected_tokens) - _floats(chosen_tokens)
    return PreferenceSummary(
        rows=len(margins),
        ties=int((margins == 0).sum()),
        is_paired=True,
        loss=loss,
        accuracy=accuracy_interval(_wins(margins), len(margins)),
        margin=mean_interval(margins),
        shorter=accuracy_interval(_wins(extra_tokens), len(extra_tokens)),
    )


def summarize_labelled(loss: float, rewards: ArrayLike, labels: ArrayLike, tokens: ArrayLike) -> PreferenceSummary:
    """Summarize unpaired rows from their rewards, labels (True = desirable) and completion lengths, each `(N,)`.

    Raises:
        DataError: the rows are all of one kind.
    """
    values, lengths, good = _floats(rewards), _floats(tokens), np.asarray(labels, dtype=bool)
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


def _floats(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _wins(differences: NDArray[np.float64]) -> float:
    return float((differences > 0).sum() + 0.5 * (differences == 0).sum())


def _share_below(values: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each value, the share of `others` below it, equal ones as half."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (left + right) / (2 * len(ordered))


def _mean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return values.mean(axis=axis)


def _difference(high: NDArray[np.float64], low: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return high.mean(axis=axis) - low.mean(axis=axis)


def _bootstrap(statistic: Any, *samples: NDArray[np.float64]) -> Estimate:
    value = float(statistic(*samples, axis=0))
    if not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    if min(map(len, samples)) < 2:  # nothing to draw from
        return Estimate(value, -math.inf, math.inf)
    interval = stats.bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_NUMBERS // max(map(len, samples))),
        vectorized=True,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
