"""A window of rewards: TRL's metrics, intervals, calibration, and an ensemble's disagreement, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from alignkit.trainers.metrics import Throughput, add_window_metrics
from alignkit.trainers.reward_metrics import RewardWindow, ensemble_metrics, reward_metrics, uncertainty_metrics

# Three pairs, two heads.
CHOSEN = torch.tensor([[1.0, 3.0], [0.0, 0.5], [-1.0, 1.0]])  # means 2, 0.25, 0
REJECTED = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])  # means 0, 0.5, -1


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def window(*summaries) -> RewardWindow:
    made = RewardWindow(*summaries)
    made.add(CHOSEN[:2], REJECTED[:2])
    made.add(CHOSEN[2:], REJECTED[2:])
    return made


def test_trls_metrics(accelerator):
    assert window(reward_metrics).means(accelerator) == pytest.approx(
        {
            "accuracy": 2 / 3,
            "margin": (2 - 0.25 + 1) / 3,
            "mean_reward": (2 + 0.25 + 0 + 0 + 0.5 - 1) / 6,
            "min_reward": -1.0,
            "max_reward": 2.0,
        }
    )


def test_uncertainty(accelerator):
    def sure(margin):
        return 1 / (1 + math.exp(-margin))

    found = window(uncertainty_metrics).means(accelerator)
    # Stated chances 0.881, 0.562 and 0.731 lie in three bins; the second pair is wrong.
    error = (abs(1 - sure(2)) + abs(0 - sure(0.25)) + abs(1 - sure(1))) / 3
    assert found["calibration_error"] == pytest.approx(error)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.207660, 0.938508), abs=1e-6)


def test_the_heads_of_an_ensemble(accelerator):
    assert window(ensemble_metrics).means(accelerator) == pytest.approx(
        {
            "ensemble/std": (1 + 0.25 + 1 + 0 + 0.5 + 1) / 6,
            "ensemble/minimum_reward": (1 + 0 - 1 + 0 + 0 - 2) / 6,
            "ensemble/minimum_accuracy": 2 / 3,  # 1 > 0, 0 = 0, -1 > -2
        }
    )


def test_equal_rewards_are_not_right(accelerator):
    tied = RewardWindow(reward_metrics)
    tied.add(torch.zeros(2, 1), torch.zeros(2, 1))
    assert tied.means(accelerator)["accuracy"] == 0


def test_a_window_ends_with_its_reading(accelerator):
    made = window(reward_metrics)
    made.means(accelerator)
    assert made.means(accelerator) == {}
    made.add(CHOSEN[:1], REJECTED[:1])
    assert made.means(accelerator)["margin"] == 2


def test_log_entries_get_their_own_window(accelerator):
    windows = {"train": window(reward_metrics), "eval": window(reward_metrics)}
    logs = {"eval_helpful_loss": 0.5, "eval_helpful_other_loss": 1.0}
    add_window_metrics(logs, windows, Throughput(), accelerator)
    assert logs["eval_helpful_accuracy"] == pytest.approx(2 / 3)
    assert "pairs_per_second" not in logs
    logs = {"loss": 0.5}
    add_window_metrics(logs, windows, Throughput(), accelerator)
    assert logs["accuracy"] == pytest.approx(2 / 3)
    assert "pairs_per_second" in logs
    logs = {"train_loss": 0.5}
    add_window_metrics(logs, windows, Throughput(), accelerator)
    assert logs == {"train_loss": 0.5}
