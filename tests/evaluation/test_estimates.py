"""Intervals against statsmodels and scipy, written-out formulas, and simulations of how often they cover the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from alignkit.errors import DataError
from alignkit.evaluation.estimates import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Estimate,
    accuracy_interval,
    cluster_mean_interval,
    mcnemar,
    mean_interval,
    paired_difference_interval,
    ranking_interval,
    rate_interval,
    ratio_interval,
    weighted_share_interval,
    wins,
)

NORMAL = np.random.default_rng(0).normal(1.0, 2.0, 200)


@pytest.mark.parametrize(("correct", "total"), [(0, 12), (1, 9), (37, 60), (199, 300), (7, 7)])
def test_wilson_agrees_with_statsmodels(correct: int, total: int) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(correct, total, alpha=0.05, method="wilson")
    assert accuracy_interval(correct, total)[1:] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_bootstrap_of_a_mean_agrees_with_scipy() -> None:
    rng = np.random.default_rng(SEED)
    expected = stats.bootstrap(
        (NORMAL,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=rng
    ).confidence_interval
    found = mean_interval(NORMAL)
    assert found.value == pytest.approx(NORMAL.mean())
    assert found[1:] == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_a_paired_difference_agrees_with_scipys_paired_bootstrap() -> None:
    noise = np.random.default_rng(1).normal(0.3, 0.1, 200)
    expected = stats.bootstrap(
        (NORMAL + noise, NORMAL),
        lambda one, other, axis: one.mean(axis) - other.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    found = paired_difference_interval(NORMAL + noise, NORMAL)
    assert found.value == pytest.approx(noise.mean())
    assert found[1:] == pytest.approx((expected.low, expected.high), rel=5e-3)
    unpaired_width = 2 * 1.96 * math.sqrt(2 * NORMAL.var() / 200)
    assert found.high - found.low < unpaired_width / 5


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """Eight copies of each value say no more than one: the interval is that of the values themselves."""
    values = NORMAL[:40]
    copies, clusters = np.repeat(values, 8), np.repeat(np.arange(40), 8).tolist()
    alone, together, ignored = mean_interval(values), cluster_mean_interval(copies, clusters), mean_interval(copies)
    assert together == pytest.approx(alone, rel=1e-9)
    assert ignored.high - ignored.low < 0.5 * (together.high - together.low)


def test_a_ratio_is_over_all_tokens() -> None:
    found = ratio_interval([6.0, 1.0], [3, 1], ["a", "b"])
    assert found.value == pytest.approx(7 / 4)
    assert (found.low, found.high) == (1.0, 2.0)
    assert ratio_interval([6.0, 1.0], [3, 1], ["a", "a"])[1:] == (-math.inf, math.inf)


def test_a_rate_of_none_or_all_is_bounded_by_the_rule_of_three() -> None:
    assert rate_interval(0, 100) == (0.0, 0.0, pytest.approx(0.0295, abs=1e-4))
    assert rate_interval(100, 100) == (1.0, pytest.approx(0.9705, abs=1e-4), 1.0)
    assert rate_interval(3, 100) == accuracy_interval(3, 100)


@pytest.mark.parametrize(("only_first", "only_second"), [(3, 11), (5, 5), (0, 7), (1, 0)])
def test_mcnemar_agrees_with_statsmodels(only_first: int, only_second: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    first = [True] * (9 + only_first) + [False] * (only_second + 4)
    second = [True] * 9 + [False] * only_first + [True] * only_second + [False] * 4
    found = mcnemar(first, second)
    expected = tables.mcnemar([[9, only_first], [only_second, 4]], exact=True)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_mcnemar_of_equals_is_no_surprise() -> None:
    assert mcnemar([True, False], [True, False]) == (0, 0, 1.0)


def test_ties_do_not_make_a_coin_look_better_than_an_untrained_model() -> None:
    ties, coin = [0.5] * 20, [1.0, 0.0] * 10
    assert mcnemar(ties, coin) == (10, 10, 1.0)
    assert mcnemar([0.5] * 8, [1.0] * 8) == (0, 8, pytest.approx(2 * 0.5**8))


@pytest.mark.parametrize(("high", "low", "least"), [([1.0], [0.0], 0.1), ([1, 2, 3], [0, -1, -2], 0.4)])
def test_a_ranking_without_overlap_has_an_interval(high: list[float], low: list[float], least: float) -> None:
    found = ranking_interval(high, low)
    assert (found.value, found.high) == (1.0, 1.0)
    assert least < found.low < 0.6
    assert ranking_interval(low, high) == pytest.approx((0.0, 0.0, 1 - found.low))


def test_the_interval_of_a_ranking_without_overlap_narrows_with_rows() -> None:
    assert ranking_interval(np.arange(100) + 1000, np.arange(100)).low == pytest.approx(0.98, abs=0.005)


def test_the_interval_of_rankings_that_hardly_overlap_covers() -> None:
    truth, rng = float(stats.norm.cdf(3 / math.sqrt(2))), np.random.default_rng(4)
    found = [ranking_interval(rng.normal(3, 1, 10), rng.normal(0, 1, 10)) for _ in range(200)]
    assert sum(each.low <= truth <= each.high for each in found) >= 186


def test_one_share_keeps_its_interval_and_equal_ones_narrow_it() -> None:
    one = accuracy_interval(8, 10)
    assert weighted_share_interval([one], [3.0]) == pytest.approx(one)
    pooled = weighted_share_interval([one, one], [1.0, 1.0])
    assert pooled.value == pytest.approx(0.8)
    assert pooled.low == pytest.approx(0.8 - (0.8 - one.low) / math.sqrt(2))
    assert pooled.high == pytest.approx(0.8 + (one.high - 0.8) / math.sqrt(2))
    perfect = weighted_share_interval([accuracy_interval(5, 5)] * 2, [1.0, 1.0])
    assert perfect.low < 0.8 < perfect.value == perfect.high


def test_ties_count_as_halves() -> None:
    assert wins([2.0, 0.0, 0.0, -1.0]) == 2.0


def test_what_does_not_match_is_refused() -> None:
    with pytest.raises(DataError, match="row by row"):
        paired_difference_interval([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="clusters"):
        cluster_mean_interval([1.0, 2.0], ["a"])
    with pytest.raises(DataError, match="no tokens"):
        ratio_interval([1.0], [0.0], ["a"])
    with pytest.raises(DataError, match="both"):
        mcnemar([True], [True, False])
    with pytest.raises(DataError, match="positive weight"):
        weighted_share_interval([accuracy_interval(1, 2)], [0.0])


def coverage(draw: Callable[[np.random.Generator], Estimate], truth: float, replications: int) -> float:
    rng = np.random.default_rng(7)
    found = [draw(rng) for _ in range(replications)]
    return sum(one.low <= truth <= one.high for one in found) / replications


@pytest.mark.parametrize(("total", "share"), [(50, 0.5), (100, 0.7), (200, 0.9)])
def test_wilson_covers(total: int, share: float) -> None:
    """Exact: the chance of every count, times whether its interval holds the truth. No simulation is needed."""
    counts = np.arange(total + 1)
    held = [one.low <= share <= one.high for one in (accuracy_interval(int(count), total) for count in counts)]
    assert 0.93 <= float((stats.binom.pmf(counts, total, share) * held).sum()) <= 0.97


@pytest.mark.slow
def test_the_bootstrap_of_a_mean_covers() -> None:
    """100 normal values, 3,000 replications: the observed coverage has a standard error of 0.4 points."""
    assert 0.93 <= coverage(lambda rng: mean_interval(rng.normal(2.0, 3.0, 100)), 2.0, 3000) <= 0.97


@pytest.mark.slow
def test_the_cluster_bootstrap_covers_and_the_plain_one_does_not() -> None:
    """60 prompts of 5 rows whose prompt decides half of the variance; 1,000 replications."""
    clusters = np.repeat(np.arange(60), 5).tolist()

    def rows(rng: np.random.Generator) -> np.ndarray:
        return np.repeat(rng.normal(0.0, 1.0, 60), 5) + rng.normal(0.5, 1.0, 300)

    assert 0.93 <= coverage(lambda rng: cluster_mean_interval(rows(rng), clusters), 0.5, 1000) <= 0.97
    assert coverage(lambda rng: mean_interval(rows(rng)), 0.5, 300) < 0.85


def test_the_paired_bootstrap_covers() -> None:
    """80 prompts; two models agree on 70 % of them and differ by 0.1 in accuracy; 1,000 replications."""

    def draw(rng: np.random.Generator) -> Estimate:
        kinds = rng.choice(4, size=80, p=[0.5, 0.2, 0.2, 0.1])  # both right, only first, both wrong, only second
        return paired_difference_interval(np.isin(kinds, (0, 1)), np.isin(kinds, (0, 3)))

    assert 0.93 <= coverage(draw, 0.1, 1000) <= 0.97


@pytest.mark.slow
def test_the_ratio_bootstrap_covers() -> None:
    """100 documents of 5 to 60 tokens whose nats vary by document and token; 1,500 replications."""

    def draw(rng: np.random.Generator) -> Estimate:
        tokens = rng.integers(5, 60, 100)
        nats = tokens * rng.normal(3.0, 0.4, 100) + rng.normal(0.0, 1.0, 100) * np.sqrt(tokens)
        return ratio_interval(nats, tokens, range(100))

    assert 0.93 <= coverage(draw, 3.0, 1500) <= 0.97


def test_the_weighted_share_covers() -> None:
    """Three subsets of 30, 60 and 120 pairs with the shares 0.6, 0.8 and 0.9, equal weights; 2,000 replications."""
    sizes, shares = (30, 60, 120), (0.6, 0.8, 0.9)

    def draw(rng: np.random.Generator) -> Estimate:
        found = [accuracy_interval(int(rng.binomial(n, p)), n) for n, p in zip(sizes, shares, strict=True)]
        return weighted_share_interval(found, [1.0, 1.0, 1.0])

    assert 0.93 <= coverage(draw, sum(shares) / 3, 2000) <= 0.97
