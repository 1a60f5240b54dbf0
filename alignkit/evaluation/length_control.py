"""A win rate that length cannot buy: preferences as a logistic function of quality and of the difference in length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignkit.errors import DataError
from alignkit.evaluation.estimates import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Estimate,
    accuracy_interval,
    as_floats,
    cluster_numbers,
)

# Prior precision of both coefficients. It moves the win rate by about RIDGE · θ / rows, less than one row's worth, and
# keeps the fit finite where every answer won.
RIDGE = 0.1
_STEPS = 200
_TOLERANCE = 1e-10
_LONGEST_STEP = 2.0
_NUMBERS_AT_ONCE = 2_000_000


class LengthControl(NamedTuple):
    """The fit of `σ(quality + length · tanh(Δ / s))`.

    Attributes:
        win_rate: `σ(quality)`: the win rate were both answers equally long, with a 95 % bootstrap interval by prompt.
            Where all preferences are the same, every draw is, and the interval is Wilson's for that many prompts.
            Where all but a few are, it is too narrow: read the raw win rate's beside it.
        quality: the intercept, in log-odds.
        length: what the judge pays for length, in log-odds.
        scale: s, the standard deviation of the lengths' differences; 0 where all differ alike.
    """

    win_rate: Estimate
    quality: float
    length: float
    scale: float

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {**self._asdict(), "win_rate": self.win_rate._asdict()}


def length_controlled_win_rate(
    preferences: ArrayLike,
    length_differences: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    ridge: float = RIDGE,
) -> LengthControl:
    """Fit AlpacaEval 2's length-controlled win rate (arXiv 2404.04475, Eq. 2) for one model and its baseline.

    `P(win) = σ(θ + φ tanh(Δ / std(Δ)))`, one intercept and one slope for each model. The win rate is the fit at Δ = 0.
    We differ in two things: there is no term for how hard a prompt is, which needs the answers of many models, and the
    likelihood has a ridge, so that a judge who always prefers one side gives a finite fit. Preferences between 0 and 1
    count by cross-entropy, ties as a half.

    Args:
        preferences: of the model's answer over the baseline's, `(N,)` in [0, 1].
        length_differences: the model's length minus the baseline's, `(N,)`, in any unit.
        clusters: of each row, its prompt; by default each row is its own.
        ridge: λ of the penalty `λ (θ² + φ²) / 2` on the summed cross-entropy; with 0, one side that always wins, or
            answers that are all equally long, have no fit.

    Raises:
        DataError: no rows, rows that do not match, preferences outside [0, 1], or nothing that can be fitted.
    """
    wanted, differences = as_floats(preferences), as_floats(length_differences)
    if not len(wanted) or wanted.shape != differences.shape:
        raise DataError(
            f"{len(wanted)} preferences and {len(differences)} length differences: give one of each per row"
        )
    if not (np.isfinite(differences).all() and ((wanted >= 0) & (wanted <= 1)).all()):  # NaN neither
        raise DataError("preferences must lie between 0 and 1, and length differences must be numbers")
    spread = float(differences.std())
    covariate = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    members = cluster_numbers(range(len(wanted)) if clusters is None else clusters)
    fitted = _fit(covariate, wanted, np.ones((1, len(wanted))), ridge)[0]
    low, high = _interval(covariate, wanted, members, ridge)
    return LengthControl(Estimate(_share(fitted[0]), low, high), float(fitted[0]), float(fitted[1]), spread)


def _interval(covariate: NDArray, wanted: NDArray, members: NDArray[np.int64], ridge: float) -> tuple[float, float]:
    count = int(members.max()) + 1
    if count < 2:
        return 0.0, 1.0
    if wanted.min() == wanted.max():
        _, low, high = accuracy_interval(float(wanted[0]) * count, count)
        return low, high
    rng = np.random.default_rng(SEED)
    at_once = max(1, _NUMBERS_AT_ONCE // len(wanted))
    qualities = []
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=rows)  # how often each cluster comes up
        qualities.append(_fit(covariate, wanted, drawn[:, members].astype(np.float64), ridge)[:, 0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(qualities), (tail, 1 - tail))
    return _share(low), _share(high)


def _fit(covariate: NDArray, wanted: NDArray, weights: NDArray, ridge: float) -> NDArray:
    """Maximise the penalised likelihood by Newton's steps of bounded length, for many weightings at once.

    Args:
        covariate, wanted: `(N,)`.
        weights: `(R, N)`.
        ridge: of both coefficients.

    Returns:
        Coefficients `(R, 2)`: intercept and slope.
    """
    found = np.zeros((len(weights), 2))
    design = np.stack([np.ones_like(covariate), covariate], axis=1)  # (N, 2)
    for _ in range(_STEPS):
        chances = 1 / (1 + np.exp(-np.clip(found @ design.T, -500, 500)))  # (R, N)
        slope = (weights * (wanted - chances)) @ design - ridge * found  # (R, 2)
        curvature = np.einsum("rn,ni,nj->rij", weights * chances * (1 - chances), design, design, optimize=True)
        try:
            step = np.linalg.solve(curvature + ridge * np.eye(2), slope[..., None])[..., 0]
        except np.linalg.LinAlgError as error:
            raise DataError("without a ridge these preferences have no fit: give ridge=0.1") from error
        size = np.linalg.norm(step, axis=1, keepdims=True)
        found += step * np.minimum(1, _LONGEST_STEP / np.maximum(size, 1e-300))
        if size.max() < _TOLERANCE:
            break
    return found


def _share(log_odds: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(log_odds, -500, 500))))
