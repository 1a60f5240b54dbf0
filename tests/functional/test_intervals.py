"""Wilson's interval against published numbers and its own definition."""

from __future__ import annotations

from math import sqrt

import pytest

from alignkit.functional.intervals import wilson_interval, zero_rate_bound


def test_a_published_interval():
    """Eight of ten: 0.49016 to 0.94332."""
    assert wilson_interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


@pytest.mark.parametrize(("successes", "trials"), [(3, 7), (150, 298), (1, 40)])
def test_its_ends_solve_the_score_equation(successes, trials):
    """`|p − t| = z sqrt(t (1 − t) / n)` at both ends t."""
    share = successes / trials
    for end in wilson_interval(successes, trials):
        assert abs(share - end) == pytest.approx(1.959963984540054 * sqrt(end * (1 - end) / trials), rel=1e-9)


def test_extremes_stay_within_bounds_and_have_a_width():
    assert wilson_interval(0, 5) == pytest.approx((0.0, 0.434482), abs=1e-6)
    assert wilson_interval(5, 5) == pytest.approx((0.565518, 1.0), abs=1e-6)


def test_less_confidence_is_narrower():
    wide, narrow = wilson_interval(6, 10), wilson_interval(6, 10, 0.5)
    assert wide[0] < narrow[0] < 0.6 < narrow[1] < wide[1]


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_no_share(successes, trials):
    with pytest.raises(ValueError, match="is not a share"):
        wilson_interval(successes, trials)


def test_none_of_n_is_the_rule_of_three():
    for trials in (30, 100, 1000):
        bound = zero_rate_bound(trials)
        assert bound == pytest.approx(3 / trials, rel=0.06)
        assert (1 - bound) ** trials == pytest.approx(0.05)  # the chance of none, were the rate as high as that
    assert zero_rate_bound(100, 0.99) > zero_rate_bound(100)
    with pytest.raises(ValueError, match="0 trials"):
        zero_rate_bound(0)
