"""The loss of a reward model, and what an ensemble of rewards says together."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class RewardLoss(NamedTuple):
    """The result of `bradley_terry`. The batch loss is the mean of `losses`, weighted by row if rows have weights."""

    losses: Tensor  # (B,)
    margins: Tensor  # (B, K) chosen − rejected, detached; sigmoid of it is the stated chance that chosen is better


class EnsembleRewards(NamedTuple):
    """What K heads say about each completion, `(B,)` each."""

    mean: Tensor
    minimum: Tensor
    spread: Tensor  # standard deviation over the heads; 0 for a single one


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
) -> RewardLoss:
    """Bradley-Terry loss of a reward model, Eq. 1 of arXiv 2203.02155, averaged over K heads.

    Each head's loss is `−(1 − ε) log σ(x) − ε log σ(−x) + κ (r_w + r_l)²` with `x = r_w − r_l − margin`. The margin is
    Llama 2's (arXiv 2307.09288, Eq. 2). The last term, of arXiv 2312.09244, pins the mean of the rewards to 0: without
    it a reward is known only up to a constant.

    Args:
        chosen: r_w, rewards of the chosen completions under each head, `(B, K)`.
        rejected: r_l, `(B, K)`.
        margin: `(B,)` by how much the chosen reward should exceed the rejected one.
        label_smoothing: ε, the chance in [0, 0.5) that a label is the wrong way round.
        center_coef: κ; 0.01 is usual.
    """
    logits = chosen - rejected  # (B, K)
    if margin is not None:
        logits = logits - margin.unsqueeze(1)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    losses = losses + center_coef * (chosen + rejected) ** 2
    return RewardLoss(losses.mean(1), (chosen - rejected).detach())


def ensemble(rewards: Tensor) -> EnsembleRewards:
    """Mean, minimum and spread over K heads (arXiv 2310.02743: the minimum is its worst-case optimisation).

    Args:
        rewards: `(B, K)`.
    """
    return EnsembleRewards(rewards.mean(1), rewards.amin(1), rewards.std(1, correction=0))
