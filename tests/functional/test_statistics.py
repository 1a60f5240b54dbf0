"""Running moments and the figures that a run is judged by, by hand and against numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from alignkit.functional.statistics import RunningMoments, calibration_error, explained_variance, pearson


def test_running_moments_by_hand() -> None:
    running = RunningMoments()
    running.update(torch.tensor([1.0, 2.0]))
    running.update(torch.tensor([[6.0]]))
    assert (running.count, running.mean) == (3, pytest.approx(3.0, rel=1e-12))
    assert running.variance == pytest.approx(14 / 3, rel=1e-12)
    assert running.std == pytest.approx(2.1602469, rel=1e-6)


def test_running_moments_do_not_depend_on_how_values_arrive() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    parts, left, right = RunningMoments(), RunningMoments(), RunningMoments()
    for part in values.split([1, 40, 0, 3, 56]):
        parts.update(part)
    left.update(values[:13])
    right.update(values[13:])
    left.merge(right)
    for found in (parts, left):
        assert found.count == 100
        assert found.mean == pytest.approx(values.mean().item(), rel=1e-12)
        assert found.variance == pytest.approx(np.var(values.numpy()), rel=1e-9)


def test_nothing_seen_and_one_value_seen() -> None:
    running = RunningMoments()
    running.update(torch.empty(0))
    assert running == RunningMoments(0, 0.0, 0.0)
    running.update(torch.tensor([2.5]))
    assert running == RunningMoments(1, 2.5, 0.0)


def test_state_survives_json_exactly() -> None:
    running, other = RunningMoments(), RunningMoments()
    running.update(torch.tensor([0.1, 0.7, -3.3]))
    other.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert other == running
    for moments in (running, other):
        moments.update(torch.tensor([0.3]))
    assert other == running


MASK = torch.tensor([[True, True, False], [True, True, False]])
RETURNS = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, float("nan")]])  # variance 1.25


def test_explained_variance_by_hand() -> None:
    values = torch.tensor([[1.5, 1.5, -9.0], [3.5, 3.5, 0.0]])  # errors ∓½: variance ¼
    assert explained_variance(values, RETURNS, MASK).item() == pytest.approx(0.8, rel=1e-6)
    assert explained_variance(RETURNS, RETURNS, MASK).item() == 1.0
    assert explained_variance(RETURNS + 7, RETURNS, MASK).item() == pytest.approx(1.0, rel=1e-6)
    assert explained_variance(torch.full_like(RETURNS, 0.3), RETURNS, MASK).item() == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(-RETURNS, RETURNS, MASK).item() == pytest.approx(-3.0, rel=1e-6)


def test_explained_variance_of_equal_returns_is_undefined() -> None:
    for constant in (0.3, 0.0, 1e3):
        assert explained_variance(torch.randn(2, 3), torch.full((2, 3), constant), MASK).isnan()


def test_pearson() -> None:
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])
    assert pearson(first, second).item() == pytest.approx(0.5, rel=1e-6)
    assert pearson(first, -2 * first + 7).item() == pytest.approx(-1.0, rel=1e-6)
    lengths, rewards = np.random.default_rng(0).normal(size=(2, 50))
    expected = np.corrcoef(lengths, rewards)[0, 1]
    assert pearson(torch.tensor(lengths), torch.tensor(rewards)).item() == pytest.approx(expected, rel=1e-9)
    assert pearson(torch.tensor([5, 5, 5]), first).isnan()


def test_calibration_error_by_hand() -> None:
    """Two bins. Below ½: .1 and .3, both wrong: gap .2, weight 2/4. Above: .6 right, 1.0 wrong: gap .3, weight 2/4."""
    probabilities = torch.tensor([0.1, 0.3, 0.6, 1.0])
    outcomes = torch.tensor([False, False, True, False])
    assert calibration_error(probabilities, outcomes, 2).item() == pytest.approx(0.25, rel=1e-6)
    assert calibration_error(probabilities, outcomes, 1).item() == pytest.approx(0.25, rel=1e-6)
    assert calibration_error(probabilities, outcomes, 4).item() == pytest.approx((0.1 + 0.3 + 0.4 + 1.0) / 4, rel=1e-6)


def test_calibrated_chances_have_no_error() -> None:
    probabilities = torch.tensor([0.25] * 4 + [0.75] * 4)
    outcomes = torch.tensor([True, False, False, False, True, True, True, False])
    assert calibration_error(probabilities, outcomes, 10).item() == pytest.approx(0.0, abs=1e-9)
    assert calibration_error(probabilities, ~outcomes, 10).item() == pytest.approx(0.5, rel=1e-6)
