"""Measured values with 95 % intervals: shares, means, differences, rankings, and rows that belong together.

Rows of one prompt are no independent trials. Where rows have `clusters`, those of one cluster are drawn together, so
that eight answers to one prompt do not count as eight prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from alignkit.errors import DataError
from alignkit.functional.intervals import wilson_interval, zero_rate_bound

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
_BATCH_NUMBERS = 4_000_000  # resampled numbers in memory at a time

Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Two ways of answering the same questions, compared where they differ.

    Attributes:
        only_first: questions on which the first did better: those that only it got right; where answers are ties,
            those too where one is a tie and the first's is the better.
        only_second: likewise.
        p_value: chance of a split at least as uneven, were both equally good.
    """

    only_first: int
    only_second: int
    p_value: float


def single_value(value: float) -> Estimate:
    """A value without an interval, such as a count: its ends are NaN, which a record holds as None."""
    return Estimate(float(value), math.nan, math.nan)


def accuracy_interval(correct: float, total: int) -> Estimate:
    """Return the share `correct / total` with Wilson's 95 % interval (Wilson 1927, Eq. 4 in Brown et al. 2001).

    A half, from ties, widens the interval: it reaches from that of the next lower to that of the next higher count.

    Raises:
        ValueError: no rows, or more correct ones than rows.
    """
    low, _ = wilson_interval(math.floor(correct), total, CONFIDENCE)
    _, high = wilson_interval(math.ceil(correct), total, CONFIDENCE)
    return Estimate(correct / total, low, high)


def rate_interval(cases: int, trials: int) -> Estimate:
    """Return the rate `cases / trials` of something unwanted with a 95 % interval.

    It is Wilson's, but where no case came up, or nothing else did, the open end is the rule of three's: see
    `alignkit.functional.intervals.zero_rate_bound`.

    Raises:
        ValueError: no trials, or more cases than trials.
    """
    found = accuracy_interval(cases, trials)
    if cases == 0:
        return Estimate(0.0, 0.0, zero_rate_bound(trials, CONFIDENCE))
    return Estimate(1.0, 1 - zero_rate_bound(trials, CONFIDENCE), 1.0) if cases == trials else found


def mean_interval(values: ArrayLike) -> Estimate:
    """Return the mean of `values` `(N,)` with a 95 % percentile bootstrap interval from a fixed seed."""
    return bootstrap_interval(_mean, as_floats(values))


def difference_interval(high: ArrayLike, low: ArrayLike) -> Estimate:
    """Return mean(`high`) - mean(`low`) of independent samples with a 95 % percentile bootstrap interval."""
    return bootstrap_interval(_difference, as_floats(high), as_floats(low))


def cluster_mean_interval(values: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """Return the mean of `values` `(N,)`; the bootstrap draws whole clusters (Cameron et al. 2008, section 3).

    Args:
        values: `(N,)`.
        clusters: of each value, what it belongs to, such as its prompt.

    Raises:
        DataError: no values, or not one cluster for each.
    """
    return ratio_interval(values, np.ones(len(as_floats(values))), clusters)


def paired_difference_interval(
    first: ArrayLike, second: ArrayLike, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """Return mean(`first` - `second`) of the same rows measured twice; the bootstrap draws rows, or whole clusters.

    Args:
        first, second: `(N,)`, row by row.
        clusters: of each row, such as its prompt; by default each row is its own.

    Raises:
        DataError: rows that do not match.
    """
    one, other = as_floats(first), as_floats(second)
    if one.shape != other.shape:
        raise DataError(
            f"{len(one)} and {len(other)} values cannot be compared row by row: measure the same rows twice"
        )
    return cluster_mean_interval(one - other, range(len(one)) if clusters is None else clusters)


def ratio_interval(totals: ArrayLike, counts: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """Return Σ `totals` / Σ `counts`, such as nats per token; the bootstrap draws whole clusters.

    Args:
        totals, counts: `(N,)`.
        clusters: of each row.

    Raises:
        DataError: no rows, nothing counted, or not one cluster for each row.
    """
    above, below = as_floats(totals), as_floats(counts)
    if not len(above) or len(clusters) != len(above) or len(below) != len(above):
        raise DataError(
            f"{len(above)} rows, {len(below)} counts and {len(clusters)} clusters: give one of each per row"
        )
    if below.sum() == 0:
        raise DataError("nothing was counted, so there is no ratio: the rows have no tokens")
    return bootstrap_interval(_ratio, sum_by(above, clusters), sum_by(below, clusters), paired=True)


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """McNemar's exact test (1947): of the questions that one of two got right, is each as often the one?

    With ties it is the sign test on who did better, of which McNemar's is the case without ties. A tie that counted as
    wrong would make any model look better than one that has not been trained, all of whose answers are ties.

    Args:
        first, second: `(N,)`, right (true or 1), wrong (false or 0) or a tie (0.5), of the same questions.

    Raises:
        DataError: rows that do not match.
    """
    one, other = as_floats(first), as_floats(second)
    if one.shape != other.shape or not len(one):
        raise DataError(f"{len(one)} and {len(other)} answers cannot be compared: give both for the same questions")
    only_first, only_second = int((one > other).sum()), int((one < other).sum())
    decided = only_first + only_second
    p_value = float(stats.binomtest(only_first, decided).pvalue) if decided else 1.0
    return McNemar(only_first, only_second, p_value)


def ranking_interval(high: ArrayLike, low: ArrayLike) -> Estimate:
    """Return P(a value of `high` > a value of `low`), ties as half, with DeLong's 95 % interval (DeLong et al. 1988).

    Where that has no width, because the two are wholly apart, or cannot have one, because there is a single value of a
    kind, the interval is Newcombe's (2006, part 2, method 5), which has.

    Raises:
        ValueError: one of the two is empty.
    """
    above, below = as_floats(high), as_floats(low)
    if not len(above) or not len(below):
        raise ValueError("ranking needs values of both kinds")
    of_above = _share_below(above, below)
    of_below = 1 - _share_below(below, above)
    value = float(of_above.mean())
    variance = sum(float(shares.var(ddof=1)) / len(shares) for shares in (of_above, of_below) if len(shares) > 1)
    if variance < 1e-12 or min(len(above), len(below)) == 1:
        return Estimate(value, *_newcombe(value, len(above), len(below)))
    reach = _normal_quantile() * math.sqrt(variance)
    return Estimate(value, max(0.0, value - reach), min(1.0, value + reach))


def _newcombe(value: float, above: int, below: int) -> tuple[float, float]:
    """The shares θ with `(value − θ)² ≤ z² V(θ)`, V after Hanley and McNeil (1982), with both sizes' mean."""
    mean_size = (above + below) / 2

    def excess(share: float) -> float:
        spread = 1 + (mean_size - 1) * ((1 - share) / (2 - share) + share / (1 + share))
        return (value - share) ** 2 - _normal_quantile() ** 2 * share * (1 - share) * spread / (above * below)

    inside = min(max(value, 1e-12), 1 - 1e-12)  # at the very ends, where V is 0, there is a root that says nothing
    root: Any = optimize.brentq  # typed as if it could return more than the root
    return 0.0 if value == 0 else root(excess, 0.0, inside), 1.0 if value == 1 else root(excess, inside, 1.0)


def _normal_quantile() -> float:
    return float(stats.norm.ppf((1 + CONFIDENCE) / 2))


def weighted_share_interval(shares: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the weighted mean of independent shares, its interval made of theirs (MOVER; Zou and Donner 2008).

    The lower end is `p − sqrt(Σ w² (pᵢ − lowᵢ)²)`, the upper end likewise: unlike a bootstrap it has a width where
    every answer was right.

    Raises:
        DataError: none, or weights that are not positive.
    """
    if not shares or len(shares) != len(weights) or min(weights) <= 0:
        raise DataError(f"{len(shares)} shares with the weights {list(weights)}: give a positive weight for each")
    parts = [weight / sum(weights) for weight in weights]
    value = math.fsum(part * share.value for part, share in zip(parts, shares, strict=True))
    below = math.fsum((part * (share.value - share.low)) ** 2 for part, share in zip(parts, shares, strict=True))
    above = math.fsum((part * (share.high - share.value)) ** 2 for part, share in zip(parts, shares, strict=True))
    return Estimate(value, max(0.0, value - math.sqrt(below)), min(1.0, value + math.sqrt(above)))


def wins(differences: ArrayLike) -> float:
    """How many differences are above 0; those that are 0 count as half."""
    values = as_floats(differences)
    return float((values > 0).sum() + 0.5 * (values == 0).sum())


def cluster_numbers(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """Number clusters from 0 in the order in which they come up, `(N,)`."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


def sum_by(values: ArrayLike, clusters: Sequence[Hashable]) -> Floats:
    """Sum `values` `(N,)` by cluster, `(C,)`."""
    return as_floats(np.bincount(cluster_numbers(clusters), weights=as_floats(values)))


def as_floats(values: ArrayLike) -> Floats:
    """Return an array in double precision."""
    return np.asarray(values, dtype=np.float64)


def bootstrap_interval(statistic: Any, *samples: Floats, paired: bool = False) -> Estimate:
    """Return a statistic with its 95 % percentile bootstrap interval (Efron 1979), from a fixed seed.

    Args:
        statistic: of arrays and an axis; vectorised.
        *samples: drawn independently, or row by row together.
        paired: whether rows of the samples belong together.
    """
    value = float(statistic(*samples, axis=0))
    if not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    if min(map(len, samples)) < 2:  # nothing to draw from
        return Estimate(value, -math.inf, math.inf)
    interval = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH_NUMBERS // max(map(len, samples))),
        vectorized=True,
        paired=paired,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def _share_below(values: Floats, others: Floats) -> Floats:
    """For each value, the share of `others` below it, equal ones as half."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (left + right) / (2 * len(ordered))


def _mean(values: Floats, axis: int) -> Floats:
    return values.mean(axis=axis)


def _difference(high: Floats, low: Floats, axis: int) -> Floats:
    return high.mean(axis=axis) - low.mean(axis=axis)


def _ratio(totals: Floats, counts: Floats, axis: int) -> Floats:
    return totals.sum(axis=axis) / counts.sum(axis=axis)
