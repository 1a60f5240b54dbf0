"""Intervals against values from tables and formulas, and summaries of rewards written down by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from alignkit.errors import DataError
from alignkit.evaluation.preference import (
    accuracy_interval,
    difference_interval,
    mean_interval,
    ranking_interval,
    summarize_labelled,
    summarize_pairs,
)


def wilson(correct: float, total: int) -> tuple[float, float]:
    z = 1.959963984540054
    share, z2 = correct / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    reach = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return centre - reach, centre + reach


@pytest.mark.parametrize(("correct", "total"), [(8, 10), (199, 300), (1, 3)])
def test_accuracy_has_wilsons_interval(correct: int, total: int) -> None:
    estimate = accuracy_interval(correct, total)
    assert estimate.value == pytest.approx(correct / total)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(correct, total), rel=1e-5)


def test_eight_of_ten_is_between_0_4902_and_0_9433() -> None:
    assert accuracy_interval(8, 10)[1:] == pytest.approx((0.49016, 0.94332), abs=1e-5)


def test_the_interval_of_all_correct_ends_at_one() -> None:
    assert accuracy_interval(5, 5).high == pytest.approx(1.0)
    assert accuracy_interval(0, 5).low == pytest.approx(0.0, abs=1e-12)


def test_a_half_reaches_over_both_neighbours() -> None:
    estimate = accuracy_interval(7.5, 10)
    assert estimate.value == 0.75
    assert (estimate.low, estimate.high) == pytest.approx((wilson(7, 10)[0], wilson(8, 10)[1]), rel=1e-5)


@pytest.mark.parametrize(("correct", "total"), [(4, 3), (-1, 3), (0, 0)])
def test_what_is_no_share_is_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        accuracy_interval(correct, total)


def test_the_bootstrap_of_a_mean_is_close_to_the_normal_interval_and_repeatable() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    estimate = mean_interval(values)
    reach = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - reach, abs=0.15 * reach)
    assert estimate.high == pytest.approx(values.mean() + reach, abs=0.15 * reach)
    assert mean_interval(values) == estimate


def test_degenerate_means() -> None:
    assert mean_interval([1.5, 1.5, 1.5]) == (1.5, 1.5, 1.5)
    assert mean_interval([2.0]) == (2.0, -math.inf, math.inf)
    assert math.isnan(mean_interval([1.0, math.nan]).low)


def test_a_difference_is_that_of_the_means() -> None:
    estimate = difference_interval([1.0, 3.0, 2.0], [0.0, 1.0])
    assert estimate.value == pytest.approx(1.5)
    assert estimate.low < 1.5 < estimate.high


def test_ranking_counts_ties_as_half_and_has_delongs_interval() -> None:
    # pairs: 3>1, 3>2, 2>1, 2=2  ->  3.5 of 4
    estimate = ranking_interval([3.0, 2.0], [1.0, 2.0])
    assert estimate.value == pytest.approx(0.875)
    # placements of the high values 1 and 3/4, of the low ones 1 and 3/4: each has variance 1/32, over 2 values
    assert estimate.low == pytest.approx(0.875 - 1.959964 * math.sqrt(1 / 32), rel=1e-5)
    assert estimate.high == 1.0


def test_ranking_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        ranking_interval([1.0], [])


def test_pairs_are_summarized() -> None:
    summary = summarize_pairs(0.6, [1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 0.0, 1.0], [5, 9, 3, 4], [7, 4, 3, 6])
    assert (summary.rows, summary.ties, summary.is_paired, summary.loss) == (4, 1, True, 0.6)
    assert summary.accuracy.value == 0.625  # two wins and a tie
    assert summary.margin.value == 0.5  # (1 - 1 + 2 + 0) / 4
    assert summary.shorter.value == 0.625  # shorter, longer, equal, shorter


def test_an_untrained_adapter_scores_one_half() -> None:
    summary = summarize_pairs(math.log(2), [0.0] * 6, [0.0] * 6, [1] * 6, [2] * 6)
    assert (summary.accuracy.value, summary.ties) == (0.5, 6)
    assert summary.shorter.value == 1.0


def test_labelled_rows_are_summarized() -> None:
    summary = summarize_labelled(0.4, [2.0, 1.0, 0.0], [True, False, False], [3, 5, 3])
    assert (summary.rows, summary.is_paired, summary.ties) == (3, False, 0)
    assert summary.accuracy.value == 1.0
    assert summary.margin.value == 1.5
    assert summary.shorter.value == 0.75  # shorter than one, as long as the other


def test_labelled_rows_of_one_kind_are_refused() -> None:
    with pytest.raises(DataError, match="all labelled the same"):
        summarize_labelled(0.4, [2.0, 1.0], [True, True], [3, 5])


def test_a_summary_becomes_plain_values() -> None:
    values = summarize_pairs(0.6, [1.0, 0.0], [0.0, 1.0], [5, 9], [7, 4]).as_dict()
    assert set(values["accuracy"]) == {"value", "low", "high"}
    assert json.loads(json.dumps(values))["margin"]["value"] == 0.0
