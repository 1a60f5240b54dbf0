"""Normalise, clip, subtract: numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.functional.statistics import RunningMoments
from alignkit.rollout.shaping import Overlong, RewardShaping, normalised, overlong_term, shape_rewards

TOTALS = torch.tensor([1.0, 3.0, 5.0, -3.0])
LENGTHS = torch.tensor([10, 80, 90, 100])
FINISHED = torch.tensor([True, True, True, False])


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_nothing_asked_is_nothing_done() -> None:
    shaped = shape_rewards(TOTALS, LENGTHS, FINISHED, RewardShaping())
    assert shaped.scores.equal(TOTALS)
    assert not shaped.is_clipped.any()
    assert shaped.penalties.eq(0).all()


def test_overlong_term() -> None:
    """L_max 100, L_buffer 20: free up to 80, then a twentieth per token, all of it from 100 on."""
    lengths = torch.tensor([0, 79, 80, 81, 90, 99, 100, 101, 500])
    close(overlong_term(lengths, 100, 20), [0, 0, 0, -0.05, -0.5, -0.95, -1.0, -1.0, -1.0])
    close(overlong_term(torch.tensor([0, 5, 10]), 10, 10), [0, -0.5, -1.0])


def test_normalise_then_clip_then_penalties() -> None:
    moments = RunningMoments()
    moments.update(TOTALS)  # mean 1.5, variance (.25 + 2.25 + 12.25 + 20.25) / 4 = 8.75, std 2.95804
    shaping = RewardShaping(
        clip_range=(-1.0, 1.0),
        missing_eos_penalty=2.0,
        overlong=Overlong(max_tokens=100, buffer_tokens=20, penalty=0.5),
    )
    shaped = shape_rewards(TOTALS, LENGTHS, FINISHED, shaping, moments)
    # normalised: −.1690309, .5070926, 1.1832160, −1.5212777
    close(shaped.scores, [-0.1690309, 0.5070926, 1.0 - 0.25, -1.0 - 2.0 - 0.5])
    assert shaped.is_clipped.tolist() == [False, False, True, True]
    close(shaped.penalties, [0.0, 0.0, 0.25, 2.5])


def test_missing_end_costs_only_the_unfinished() -> None:
    shaped = shape_rewards(TOTALS, LENGTHS, FINISHED, RewardShaping(missing_eos_penalty=1.5))
    close(shaped.scores, [1.0, 3.0, 5.0, -4.5])


def test_clipping_alone() -> None:
    shaped = shape_rewards(TOTALS, LENGTHS, FINISHED, RewardShaping(clip_range=(-2.0, 3.0)))
    close(shaped.scores, [1.0, 3.0, 3.0, -2.0])
    assert shaped.is_clipped.tolist() == [False, False, True, True]


def test_normalised_rewards_have_mean_zero_and_unit_spread() -> None:
    moments = RunningMoments()
    moments.update(TOTALS)
    result = normalised(TOTALS, moments)
    assert result.mean().abs() < 1e-6
    assert result.std(correction=0) == pytest.approx(1.0)


def test_equal_rewards_normalise_to_zero() -> None:
    moments = RunningMoments()
    moments.update(torch.full((3,), 2.0))
    assert normalised(torch.full((3,), 2.0), moments).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardShaping(clip_range=(1.0, -1.0)), r"clip_range=\(1\.0, -1\.0\): must be two finite numbers"),
        (lambda: RewardShaping(clip_range=(1.0, 1.0)), "clip_range="),
        (lambda: RewardShaping(clip_range=(-math.inf, 1.0)), "clip_range="),
        (
            lambda: RewardShaping(missing_eos_penalty=-1.0),
            r"missing_eos_penalty=-1\.0: must be a finite number, 0 or m",
        ),
        (lambda: RewardShaping(missing_eos_penalty=math.nan), "missing_eos_penalty=nan"),
        (lambda: Overlong(max_tokens=10, buffer_tokens=0), "overlong_buffer_tokens=0: must be between 1 and .* 10"),
        (lambda: Overlong(max_tokens=10, buffer_tokens=11), "overlong_buffer_tokens=11"),
        (lambda: Overlong(max_tokens=10, buffer_tokens=5, penalty=-1.0), r"overlong_penalty=-1\.0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
