"""PPO's metrics by hand-derived numbers, and that they do not depend on how items are split."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from alignkit.checkpoint.states import read_states, write_states
from alignkit.errors import ConfigError
from alignkit.functional.ppo import clipped_policy_loss, clipped_value_loss
from alignkit.functional.statistics import RunningMoments, pearson
from alignkit.functional.statistics import explained_variance as explained
from alignkit.trainers.pooled import (
    Pooled,
    PooledWindow,
    correlation,
    deviation,
    explained_variance,
    mean,
    rate,
    total,
    variance,
)
from alignkit.trainers.ppo_metrics import (
    METRICS,
    check_component_names,
    completion_metrics,
    ensemble_metrics,
    minibatch_metrics,
    reward_metrics,
    rollout_metrics,
    shaping_metrics,
    value_metrics,
)
from tests.trainers.ppo_rollouts import MASK, RETURNS, rewards, rollout


def read(metrics: dict[str, Pooled]) -> dict[str, float | None]:
    return {name: metric.read() for name, metric in metrics.items()}


class OtherProcess(Accelerator):
    """An accelerator whose other process has seen `other`."""

    def __init__(self, other: torch.Tensor) -> None:
        super().__init__(cpu=True)
        self.other, self.calls = other, 0

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        assert reduction == "sum"
        self.calls += 1
        return tensor + self.other


def test_the_objective_is_that_of_kept_completions():
    """KL per completion .2, .4, .3; k2 .05, .04, .015; k3 by e^−d − 1 + d; −log-probs 3, 1, 6; scores 1, 2, 4.5."""
    expected = {
        "objective/kl": 0.3,
        "objective/kl_k2": 0.105 / 3,
        "objective/kl_k3": (0.0408182207 + 0.0051709181 + 2 * 0.0187307531 + 3 * 0.0048374180) / 3,
        "objective/entropy": 10 / 3,
        "objective/non_score_reward": -0.03,
        "objective/rlhf_reward": 2.47,
        "objective/scores": 2.5,
        "objective/scores_std": math.sqrt((2.25 + 0.25 + 4.0) / 3),
        "val/num_eos_tokens": 3.0,
    }
    assert read(rollout_metrics(rollout(), kl_coef=0.1)) == pytest.approx(expected, rel=1e-5)


def test_a_penalty_in_the_loss_is_no_part_of_the_reward():
    found = read(rollout_metrics(rollout(), kl_coef=0.0))
    assert found["objective/non_score_reward"] == 0.0
    assert found["objective/rlhf_reward"] == found["objective/scores"] == 2.5
    assert found["objective/kl"] == pytest.approx(0.3, rel=1e-5)


def test_lengths_endings_and_speed_are_those_of_all_completions():
    expected = {
        "completions/mean_length": 9 / 4,
        "completions/eos_rate": 3 / 4,
        "completions/tokens_per_second": 9 / 0.5,
    }
    assert read(completion_metrics(rollout(), processes=1)) == pytest.approx(expected, rel=1e-12)


def test_processes_that_work_at_the_same_time_add_their_speeds():
    """9 tokens in 0.5 s here, 9 in 1.0 s there: 18 tokens in 0.75 s on average."""
    one, two = rollout(), rollout()
    two.seconds["generate"] = 1.0
    figures = [completion_metrics(each, processes=2)["completions/tokens_per_second"] for each in (one, two)]
    assert figures[0].merged(figures[1]).read() == pytest.approx(24.0)


def test_rewards_count_where_they_apply():
    """`polite` said .5, 1.5, 2.5; its 0 for the last completion means nothing."""
    expected = {
        "rewards/polite": 1.5,
        "rewards/polite/std": math.sqrt(2 / 3),
        "rewards/short": 5.5 / 4,
        "rewards/short/std": math.sqrt((0.25 + 0.25 + 20.25) / 4 - 1.375**2),
        "rewards/dropped": 1.0,
    }
    assert read(reward_metrics(rewards())) == pytest.approx(expected, rel=1e-6)


def test_disagreement_is_that_of_all_reward_models():
    found = read(ensemble_metrics([torch.tensor([1.0, 2.0]), torch.tensor([4.0, 5.0])]))
    assert found == {"rewards/ensemble_std": 3.0}
    assert ensemble_metrics([]) == {}


def test_shaping_and_length_are_those_of_kept_completions():
    """Rewards 1, 2, 4.5 at 3, 2, 3 tokens: covariance 0.5/3, variances 6.5/3 and 2/9."""
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    expected = {
        "objective/kl_coef": 0.07,
        "rewards/clip_fraction": 1 / 3,
        "rewards/length_correlation": (0.5 / 3) / math.sqrt(6.5 / 3 * 2 / 9),
        "rewards/running_mean": 2.0,
        "rewards/running_std": 1.0,
    }
    assert read(shaping_metrics(rollout(), kl_coef=0.07, moments=moments)) == pytest.approx(expected, rel=1e-6)
    without = shaping_metrics(rollout(), kl_coef=0.07, moments=None)
    assert not {"rewards/running_mean", "rewards/running_std"} & without.keys()


def test_the_critic_is_judged_on_tokens_that_count():
    """Returns 1, 2, 4, 0, 1, 0, 3, 5 have mean 2 and variance 3; errors 0, 0, 1, −1, 0, 0, 1, 1: 1/2 − 1/16."""
    tokens = rollout().tokens
    found = value_metrics(tokens, RETURNS, MASK)["val/explained_variance"].read()
    assert found == pytest.approx(1 - (4 / 8 - (2 / 8) ** 2) / 3, rel=1e-12)
    assert value_metrics(tokens, torch.zeros(4, 3), MASK)["val/explained_variance"].read() is None


def test_a_minibatch_by_hand():
    """Log-ratios 0 and ln 1.5 at cliprange 0.2, advantages 1 and 1: the second token is clipped."""
    old = torch.tensor([-1.0, -2.0])
    logps = old + torch.tensor([0.0, math.log(1.5)])
    policy = clipped_policy_loss(logps, old, torch.tensor([1.0, 1.0]), cliprange=0.2)
    value = clipped_value_loss(
        torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0]), cliprange_value=0.2
    )
    found = read(minibatch_metrics(logps, old, torch.tensor([0.5, 1.5]), policy, value))
    assert found.pop("val/ratio_var") is None  # one micro-batch has none
    assert found == pytest.approx(
        {
            "policy/approxkl_avg": math.log(1.5) ** 2 / 4,
            "policy/clipfrac_avg": 0.5,
            "policy/entropy_avg": 1.0,
            "loss/policy_avg": -(1 + 1.2) / 2,
            "val/ratio": 1.25,
            "loss/value_avg": (4 + 1.8**2) / 4,
            "val/clipfrac_avg": 0.5,
        },
        rel=1e-5,
    )
    assert not {"loss/value_avg", "val/clipfrac_avg"} & minibatch_metrics(logps, old, old, policy, None).keys()


def test_the_ratios_variance_is_over_micro_batches():
    """Mean ratios 1 and 2: unbiased variance 0.5."""
    parts = []
    for ratio in ([1.0, 1.0], [1.0, 3.0]):
        logps = torch.tensor(ratio).log()
        policy = clipped_policy_loss(logps, torch.zeros(2), torch.ones(2), cliprange=0.2)
        parts.append(minibatch_metrics(logps, torch.zeros(2), torch.zeros(2), policy, None)["val/ratio_var"])
    assert parts[0].merged(parts[1]).read() == pytest.approx(0.5, rel=1e-6)


def test_a_micro_batch_without_tokens_says_nothing():
    none = torch.zeros(0)
    policy = clipped_policy_loss(none, none, none, cliprange=0.2)
    assert set(read(minibatch_metrics(none, none, none, policy, None)).values()) == {None}


def test_every_metric_is_in_the_table():
    parts = (
        rollout_metrics(rollout(), kl_coef=0.1),
        completion_metrics(rollout(), processes=1),
        shaping_metrics(rollout(), kl_coef=0.1, moments=RunningMoments(2, 0.0, 1.0)),
        value_metrics(rollout().tokens, RETURNS, MASK),
        ensemble_metrics([torch.ones(4)]),
        {name.replace("polite", "<name>").replace("short", "<name>"): 0 for name in reward_metrics(rewards())},
        minibatch_metrics(
            torch.zeros(1),
            torch.zeros(1),
            torch.zeros(1),
            clipped_policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), cliprange=0.2),
            clipped_value_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), cliprange_value=0.2),
        ),
    )
    names = [name for part in parts for name in part]
    assert sorted(set(names)) == sorted(METRICS)
    for one, first in enumerate(parts):  # and computed in one place
        assert not any(first.keys() & other.keys() for other in parts[one + 1 :])


@pytest.mark.parametrize("names", [["polite", "dropped"], ["a", "a/std"], ["length_correlation"], ["ensemble_std"]])
def test_rewards_with_the_names_of_other_metrics_are_refused(names):
    with pytest.raises(ConfigError, match="which is taken: rename it"):
        check_component_names(names)
    check_component_names(["polite", "short"])


@pytest.mark.parametrize("sizes", [(20,), (1, 19), (7, 0, 13), (5, 5, 5, 5)])
def test_figures_do_not_depend_on_the_split(sizes):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(20, generator=generator) + 5 for _ in range(2))
    window = PooledWindow()
    for a, b in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
        window.add(
            {
                "mean": mean(a),
                "deviation": deviation(a),
                "variance": variance(a),
                "correlation": correlation(a, b),
                "explained": explained_variance(a, b),
                "total": total(a),
                "rate": rate(float(len(a)), 0.25 * len(a), 2),
            }
        )
    found = window.means(Accelerator(cpu=True))
    expected = {
        "mean": x.double().mean(),
        "deviation": x.double().std(correction=0),
        "variance": x.double().var(),
        "correlation": pearson(x, y),
        "explained": explained(x, y, torch.ones(20, dtype=torch.bool)),
        "total": x.double().sum(),
        "rate": 8.0,
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-9)
    assert window.means(Accelerator(cpu=True)) == {}


def test_processes_are_pooled_with_one_call():
    mine, other = torch.tensor([1.0, 2.0]), torch.tensor([6.0])
    window = PooledWindow()
    window.add({"b": deviation(mine), "a": mean(mine)})
    accelerator = OtherProcess(torch.cat([mean(other).sums, deviation(other).sums]))  # in the order of names
    both = torch.cat([mine, other])
    assert window.means(accelerator) == pytest.approx({"a": 3.0, "b": both.double().std(correction=0).item()})
    assert accelerator.calls == 1


def test_what_has_nothing_to_say_is_left_out():
    window = PooledWindow()
    same = torch.full((16,), 0.1)
    window.add({"none": mean(torch.zeros(0)), "flat": correlation(same, torch.arange(16.0)), "spread": deviation(same)})
    assert window.means(Accelerator(cpu=True)) == {"spread": 0.0}


def test_a_diverged_run_logs_nan_and_not_nothing():
    window = PooledWindow()
    bad = torch.tensor([1.0, math.nan])
    window.add({"mean": mean(bad), "deviation": deviation(bad), "explained": explained_variance(bad, bad)})
    found = window.means(Accelerator(cpu=True))
    assert sorted(found) == ["deviation", "explained", "mean"]
    assert all(math.isnan(value) for value in found.values())


def test_an_open_window_survives_a_file_bit_for_bit(tmp_path: Path):
    window, resumed = PooledWindow(), PooledWindow()
    window.add(rollout_metrics(rollout(), kl_coef=0.1))
    write_states(tmp_path / "states", window.state_dict())
    resumed.load_state_dict(read_states(tmp_path / "states"))
    assert resumed.figures()["objective/kl"].read() == window.figures()["objective/kl"].read()
    for each in (window, resumed):
        each.add(rollout_metrics(rollout(), kl_coef=0.3))
    assert resumed.means(Accelerator(cpu=True)) == window.means(Accelerator(cpu=True))
