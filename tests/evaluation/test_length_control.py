"""Length-controlled win rates against a logistic regression written out here, and against statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from alignkit.errors import DataError
from alignkit.evaluation.length_control import RIDGE, length_controlled_win_rate

RNG = np.random.default_rng(11)
LENGTHS = RNG.normal(60, 150, 300)
CHANCES = 1 / (1 + np.exp(-(-0.4 + 1.3 * np.tanh(LENGTHS / LENGTHS.std()))))
WINS = (RNG.uniform(size=300) < CHANCES).astype(float)


def regression(preferences: np.ndarray, lengths: np.ndarray, ridge: float) -> np.ndarray:
    """Minimise the cross-entropy of `σ(θ + φ tanh(Δ / s))` with a ridge, by scipy."""
    covariate = np.tanh(lengths / lengths.std())

    def loss(coefficients: np.ndarray) -> float:
        logits = coefficients[0] + coefficients[1] * covariate
        return float((np.logaddexp(0, logits) - preferences * logits).sum() + ridge / 2 * (coefficients**2).sum())

    return optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-8}).x


@pytest.mark.parametrize("preferences", [WINS, np.where(np.arange(300) % 5 == 0, 0.5, WINS)], ids=["plain", "ties"])
def test_it_is_the_logistic_regression(preferences: np.ndarray) -> None:
    expected = regression(preferences, LENGTHS, RIDGE)
    found = length_controlled_win_rate(preferences, LENGTHS)
    assert (found.quality, found.length) == pytest.approx(tuple(expected), rel=1e-4)
    assert found.win_rate.value == pytest.approx(1 / (1 + math.exp(-expected[0])), rel=1e-5)
    assert found.scale == pytest.approx(LENGTHS.std())


def test_without_a_ridge_it_is_statsmodels_glm() -> None:
    api = pytest.importorskip("statsmodels.api")
    design = np.stack([np.ones(300), np.tanh(LENGTHS / LENGTHS.std())], axis=1)
    expected = api.GLM(WINS, design, family=api.families.Binomial()).fit().params
    found = length_controlled_win_rate(WINS, LENGTHS, ridge=0.0)
    assert (found.quality, found.length) == pytest.approx(tuple(expected), rel=1e-6)


def test_length_does_not_buy_a_win() -> None:
    """A judge who likes nothing but length: raw, the longer answers win; at equal length neither does."""
    rng = np.random.default_rng(3)
    lengths = rng.normal(100, 100, 4000)
    preferences = (rng.uniform(size=4000) < 1 / (1 + np.exp(-2 * np.tanh(lengths / lengths.std())))).astype(float)
    found = length_controlled_win_rate(preferences, lengths)
    assert preferences.mean() > 0.65
    assert found.win_rate.value == pytest.approx(0.5, abs=0.03)
    assert found.win_rate.low < 0.5 < found.win_rate.high
    assert found.length > 1.5


def test_equal_lengths_leave_the_win_rate_alone() -> None:
    found = length_controlled_win_rate([1, 1, 0, 0.5] * 50, [7.0] * 200)
    assert found.win_rate.value == pytest.approx(0.625, abs=2e-3)
    assert (found.length, found.scale) == (0.0, 0.0)


@pytest.mark.parametrize("preference", [1.0, 0.0])
def test_a_judge_who_always_prefers_one_side_has_a_finite_fit(preference: float) -> None:
    found = length_controlled_win_rate([preference] * 40, RNG.normal(0, 5, 40))
    assert abs(found.win_rate.value - preference) < 0.05
    assert 0 < found.win_rate.value < 1
    assert math.isfinite(found.length)


@pytest.mark.parametrize("preference", [1.0, 0.5, 0.0])
def test_a_judge_of_one_mind_leaves_room_for_doubt(preference: float) -> None:
    found = length_controlled_win_rate([preference] * 20, np.arange(20)).win_rate
    assert found.low <= found.value <= found.high
    assert found.high - found.low > 0.15


def test_what_has_no_fit_without_a_ridge_is_told() -> None:
    with pytest.raises(DataError, match="give ridge"):
        length_controlled_win_rate([1.0, 0.0], [0.0, 0.0], ridge=0.0)


def test_length_that_separates_wins_from_losses_has_a_finite_fit() -> None:
    lengths = np.linspace(-3, 3, 40)
    found = length_controlled_win_rate((lengths > 0).astype(float), lengths)
    assert math.isfinite(found.length)
    assert found.length > 3
    assert found.win_rate.value == pytest.approx(0.5, abs=1e-6)


def test_the_interval_draws_prompts() -> None:
    few, lengths = WINS[:60], LENGTHS[:60]
    alone = length_controlled_win_rate(few, lengths)
    copies = length_controlled_win_rate(np.repeat(few, 5), np.repeat(lengths, 5), np.repeat(np.arange(60), 5).tolist())
    ignored = length_controlled_win_rate(np.repeat(few, 5), np.repeat(lengths, 5))
    widths = [one.win_rate.high - one.win_rate.low for one in (alone, copies, ignored)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] < 0.6 * widths[0]


@pytest.mark.parametrize(
    ("preferences", "lengths"),
    [([], []), ([1.0], [1.0, 2.0]), ([1.2], [0.0]), ([math.nan], [0.0]), ([1.0], [math.inf])],
)
def test_what_is_no_preference_is_refused(preferences: list[float], lengths: list[float]) -> None:
    with pytest.raises(DataError):
        length_controlled_win_rate(preferences, lengths)


@pytest.mark.slow
def test_the_interval_covers() -> None:
    """150 prompts, θ = 0.4, φ = 0.8, 500 replications: a standard error of one point."""
    truth, covered = 1 / (1 + math.exp(-0.4)), 0
    rng = np.random.default_rng(21)
    for _ in range(500):
        lengths = rng.normal(0, 1, 150)
        chances = 1 / (1 + np.exp(-(0.4 + 0.8 * np.tanh(lengths / lengths.std()))))
        found = length_controlled_win_rate((rng.uniform(size=150) < chances).astype(float), lengths).win_rate
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 500 <= 0.97
