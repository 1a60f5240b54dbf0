"""Calibration against numbers written down by hand, and a model that is calibrated by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignkit.evaluation.calibration import calibrate


def test_by_hand() -> None:
    """Chances 0.88 (twice, one of them wrong) and 0.62 (right): gaps 0.38 and 0.38 of 2 and 1 pairs."""
    sure, unsure = 2.0, 0.5
    found = calibrate([sure, -sure, unsure])
    high, low = 1 / (1 + math.exp(-sure)), 1 / (1 + math.exp(-unsure))
    assert found.error == pytest.approx((2 * abs(0.5 - high) + 1 * abs(1 - low)) / 3, rel=1e-6)
    assert [part.rows for part in found.bins] == [1, 2]
    assert found.bins[0].confidence == pytest.approx(low, rel=1e-6)
    assert (found.bins[1].low, found.bins[1].high) == pytest.approx((0.8, 0.9))
    assert found.bins[1].accuracy.value == 0.5


def test_a_tie_is_right_by_half_and_sure_by_half() -> None:
    assert calibrate([0.0, 0.0, 0.0]).error == 0.0


def test_a_calibrated_model_has_a_small_error_and_a_boastful_one_a_large_one() -> None:
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.5, 1.0, 20_000)
    margins = np.log(chances / (1 - chances)) * np.where(rng.uniform(size=20_000) < chances, 1, -1)
    assert calibrate(margins).error < 0.02
    assert calibrate(5 * margins).error > 0.15
