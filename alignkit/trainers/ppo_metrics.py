"""What is measured of a PPO run: every metric, by name, and the one function that computes it.

Names and meanings are those of TRL's PPO where it had them. All functions are pure and return `Pooled` figures, which
add up over batches, rollouts and processes; a metric's value in the log is that of everything since the last log.

| function | metrics | called by |
|---|---|---|
| `rollout_metrics` | `objective/*` except the coefficient, `val/num_eos_tokens` | the trainer |
| `completion_metrics` | `completions/*` | `RolloutCallback` |
| `reward_metrics` | `rewards/<name>`, `rewards/<name>/std`, `rewards/dropped` | `RewardCallback` |
| `ensemble_metrics` | `rewards/ensemble_std` | the trainer, with a reward model of several heads |
| `shaping_metrics` | the other `rewards/*`, `objective/kl_coef` | `RewardCallback` |
| `value_metrics` | `val/explained_variance` | `ValueCallback` |
| `minibatch_metrics` | `policy/*`, `loss/*`, the other `val/*` | the trainer |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.functional.kl import k1, k2, k3
from alignkit.functional.ppo import PolicyLoss, ValueLoss
from alignkit.functional.statistics import RunningMoments
from alignkit.rollout.collect import Rollout, TokenTable
from alignkit.rollout.mix import RewardResult
from alignkit.trainers.pooled import Pooled, correlation, deviation, explained_variance, mean, rate, total, variance

GENERATION_SECONDS = "generate"  # the entry of `Rollout.seconds` that says how long generation took


class Metric(NamedTuple):
    """What a metric is, with its unit, and what is healthy."""

    meaning: str
    healthy: str


METRICS: dict[str, Metric] = {
    "objective/kl": Metric("KL from the reference, k1 (nats per completion)", "0 to 10, rising slowly; never below 0"),
    "objective/kl_k2": Metric("the same by k2, summed over tokens (nats per completion)", "near objective/kl"),
    "objective/kl_k3": Metric("the same by k3, summed over tokens (nats per completion)", "near objective/kl"),
    "objective/kl_coef": Metric("weight of the KL penalty", "constant, or moving slowly with kl_target"),
    "objective/entropy": Metric("−log-prob of what was sampled (nats per completion)", "falls slowly, stays above 0"),
    "objective/non_score_reward": Metric("KL penalty in the reward, per completion", "smaller than the scores' rise"),
    "objective/rlhf_reward": Metric("score plus KL penalty, per completion", "rises"),
    "objective/scores": Metric("shaped reward, without the KL penalty, per completion", "rises"),
    "objective/scores_std": Metric("standard deviation of the scores over completions", "does not vanish"),
    "policy/approxkl_avg": Metric("k2 from the rollout's policy (nats per token)", "0.001 to 0.05"),
    "policy/clipfrac_avg": Metric("share of tokens whose ratio is clipped", "0.02 to 0.2"),
    "policy/entropy_avg": Metric("entropy of the next-token distribution (nats)", "falls slowly"),
    "loss/policy_avg": Metric("policy loss, per token", "near 0"),
    "loss/value_avg": Metric("value loss before vf_coef, per token", "falls"),
    "val/clipfrac_avg": Metric("share of tokens whose value is clipped", "below 0.2"),
    "val/ratio": Metric("importance ratio, per token", "0.95 to 1.05"),
    "val/ratio_var": Metric("variance of the mean ratio over micro-batches", "below 0.01"),
    "val/num_eos_tokens": Metric("completions that ended by themselves, since the last log", "most of them"),
    "val/explained_variance": Metric("share of the returns' variance that the critic knows", "rises to 0.3 or more"),
    "rewards/<name>": Metric("what this reward said, where it applied", "rises"),
    "rewards/<name>/std": Metric("its standard deviation over completions", "does not vanish"),
    "rewards/dropped": Metric("samples without a reward, since the last log", "0"),
    "rewards/ensemble_std": Metric("standard deviation over the heads of a reward model", "steady"),
    "rewards/clip_fraction": Metric("share of rewards that reward_clip changed", "below 0.1"),
    "rewards/length_correlation": Metric("Pearson's correlation of reward and tokens", "−0.4 to 0.4"),
    "rewards/running_mean": Metric("mean that normalize_rewards subtracts", "rises slowly"),
    "rewards/running_std": Metric("deviation that normalize_rewards divides by", "steady"),
    "completions/mean_length": Metric("tokens per completion, EOS included", "steady"),
    "completions/eos_rate": Metric("share of completions that ended by themselves", "above 0.5"),
    "completions/tokens_per_second": Metric("tokens generated per second, all processes", "steady"),
}
FIXED_REWARD_NAMES = tuple(
    name.removeprefix("rewards/") for name in METRICS if name.startswith("rewards/") and "<" not in name
)


def rollout_metrics(rollout: Rollout, *, kl_coef: float) -> dict[str, Pooled]:
    """Measure the objective on the completions that were kept.

    KL and entropy are sums over a completion's tokens: `Σ_t k(log π_t, log π_ref,t)`, and `−Σ_t log π_t`.

    Args:
        rollout: episodes of this process.
        kl_coef: of the KL penalty in the reward; 0 where it is a term of the loss.
    """
    kept, mask, tokens = rollout.rewards.kept, rollout.mask, rollout.tokens
    logps, ref_logps = tokens.logps.double(), tokens.ref_logps.double()  # (B, T)

    def per_completion(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum(1)[kept]

    kl, scores = per_completion(k1(logps, ref_logps)), rollout.scores[kept]
    return {
        "objective/kl": mean(kl),
        "objective/kl_k2": mean(per_completion(k2(logps, ref_logps))),
        "objective/kl_k3": mean(per_completion(k3(logps, ref_logps))),
        "objective/entropy": mean(per_completion(-logps)),
        "objective/non_score_reward": mean(-kl_coef * kl),
        "objective/rlhf_reward": mean(scores - kl_coef * kl),
        "objective/scores": mean(scores),
        "objective/scores_std": deviation(scores),
        "val/num_eos_tokens": total(_finished(rollout)),
    }


def completion_metrics(rollout: Rollout, *, processes: int) -> dict[str, Pooled]:
    """Measure length, endings and speed of all completions, dropped ones included."""
    lengths = _lengths(rollout)
    seconds = rollout.seconds.get(GENERATION_SECONDS, 0.0)
    return {
        "completions/mean_length": mean(lengths),
        "completions/eos_rate": mean(_finished(rollout)),
        "completions/tokens_per_second": rate(lengths.sum().item(), seconds, processes),
    }


def reward_metrics(rewards: RewardResult) -> dict[str, Pooled]:
    """Measure each component where it applies, and count the dropped samples.

    Raises:
        ConfigError: a component has the name of another metric.
    """
    check_component_names(rewards.components)
    metrics: dict[str, Pooled] = {}
    for name, (values, applies) in rewards.components.items():
        metrics[f"rewards/{name}"] = mean(values[applies])
        metrics[f"rewards/{name}/std"] = deviation(values[applies])
    return metrics | {"rewards/dropped": total(~rewards.kept)}


def ensemble_metrics(spreads: Sequence[Tensor]) -> dict[str, Pooled]:
    """Measure how far the heads of reward models disagree.

    Args:
        spreads: one tensor `(B,)` per reward model of several heads: their standard deviation on each completion.
    """
    return {"rewards/ensemble_std": mean(torch.cat(list(spreads)))} if spreads else {}


def shaping_metrics(rollout: Rollout, *, kl_coef: float, moments: RunningMoments | None) -> dict[str, Pooled]:
    """Measure what became of the rewards, and whether they pay for length.

    Args:
        rollout: episodes of this process.
        kl_coef: weight of the KL penalty, wherever it is charged.
        moments: that rewards are normalised with, alike on all processes; `None` without normalisation.
    """
    kept = rollout.rewards.kept
    metrics = {
        "objective/kl_coef": mean(torch.tensor(kl_coef, dtype=torch.float64)),
        "rewards/clip_fraction": mean(rollout.is_clipped[kept]),
        "rewards/length_correlation": correlation(rollout.rewards.totals[kept], _lengths(rollout)[kept]),
    }
    if moments is not None:
        metrics["rewards/running_mean"] = mean(torch.tensor(moments.mean, dtype=torch.float64))
        metrics["rewards/running_std"] = mean(torch.tensor(moments.std, dtype=torch.float64))
    return metrics


def value_metrics(tokens: TokenTable, returns: Tensor, mask: Tensor) -> dict[str, Pooled]:
    """Measure how much of the returns `(B, T)` the critic knew beforehand."""
    return {"val/explained_variance": explained_variance(tokens.values[mask], returns[mask])}


def minibatch_metrics(
    logps: Tensor, old_logps: Tensor, entropies: Tensor, policy: PolicyLoss, value: ValueLoss | None
) -> dict[str, Pooled]:
    """Measure one micro-batch of training.

    Args:
        logps: log π of its tokens `(S,)`; only those that count.
        old_logps: of the policy that wrote them, `(S,)`.
        entropies: of the next-token distributions `(S,)`, in nats.
        policy: of the same tokens.
        value: of the same tokens; `None` without a critic.
    """
    metrics = {
        "policy/approxkl_avg": mean(k2(logps, old_logps)),
        "policy/clipfrac_avg": mean(policy.is_clipped),
        "policy/entropy_avg": mean(entropies),
        "loss/policy_avg": mean(policy.losses),
        "val/ratio": mean(policy.ratio),
        "val/ratio_var": variance(policy.ratio.mean()[None] if policy.ratio.numel() else policy.ratio),
    }
    if value is not None:
        metrics["loss/value_avg"] = mean(value.losses)
        metrics["val/clipfrac_avg"] = mean(value.is_clipped)
    return metrics


def check_component_names(names: Iterable[str]) -> None:
    """Refuse rewards whose metrics would have the names of others.

    Raises:
        ConfigError: such a name.
    """
    names = list(names)
    taken = {*FIXED_REWARD_NAMES, *(f"{name}/std" for name in names)}
    for name in names:
        if name in taken:
            raise ConfigError(f"the reward '{name}' would be logged as rewards/{name}, which is taken: rename it")


def _lengths(rollout: Rollout) -> Tensor:
    """Tokens of each completion, EOS included, `(B,)`."""
    return torch.tensor([len(completion.ids) for completion in rollout.completions], dtype=torch.float64)


def _finished(rollout: Rollout) -> Tensor:
    """Whether each completion ended by itself, boolean `(B,)`."""
    return torch.tensor([completion.finished for completion in rollout.completions])
