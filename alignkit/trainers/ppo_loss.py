"""PPO's loss on a chunk of episodes: from token scores to one sum, and the metrics on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.data.layout import Layout
from alignkit.functional.kl import k2, k3
from alignkit.functional.ppo import PolicyLoss, ValueLoss, clipped_policy_loss, clipped_value_loss
from alignkit.functional.sequence import sequence_logps
from alignkit.trainers.pooled import Pooled
from alignkit.trainers.ppo_config import PPOConfig
from alignkit.trainers.ppo_metrics import minibatch_metrics

# What a rollout knows of every token, and training reads: `(P, G, T)` each.
TOKEN_COLUMNS = ("mask", "old_logps", "ref_logps", "old_values", "advantages", "returns")


class ChunkScores(NamedTuple):
    """What the model says of a chunk's S tokens now, with gradient, `(S,)` each."""

    logps: Tensor
    values: Tensor | None
    entropies: Tensor


def token_columns(inputs: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The rollout's columns at the tokens of a layout, `(S,)` each."""
    place = (layout.sequence_index, layout.completion_position)
    return {name: inputs[name].flatten(0, 1)[place] for name in TOKEN_COLUMNS}


def ppo_loss(
    scores: ChunkScores,
    columns: Mapping[str, Tensor],
    layout: Layout,
    args: PPOConfig,
    *,
    kl_coef: float,
    policy_weight: float,
) -> tuple[Tensor, dict[str, Pooled]]:
    """Sum of the losses of the tokens that count, and their metrics; the caller divides by the step's tokens.

    `policy + vf_coef · value − entropy_coef · entropy`, and `kl_coef · KL` where the penalty is a term of the loss: k2
    of whole completions, whose gradient is that of the KL divergence, or k3 of tokens.

    Args:
        scores: of the policy as it is now.
        columns: from `token_columns`.
        layout: of the chunk.
        args: clip ranges and weights.
        kl_coef: of the term in the loss; 0 where the penalty is in the reward.
        policy_weight: 0 while the critic warms up, else 1.
    """
    counts = columns["mask"]
    policy = clipped_policy_loss(scores.logps, columns["old_logps"], columns["advantages"], cliprange=args.cliprange)
    total = policy_weight * _sum(policy.losses - args.entropy_coef * scores.entropies, counts)
    if kl_coef:
        total = total + policy_weight * kl_coef * _kl_term(scores.logps, columns["ref_logps"], counts, layout, args)
    value = None
    if scores.values is not None:
        value = clipped_value_loss(
            scores.values, columns["old_values"], columns["returns"], cliprange_value=args.cliprange_value
        )
        total = total + args.vf_coef * _sum(value.losses, counts)
        value = ValueLoss(*(part[counts] for part in value))
    metrics = minibatch_metrics(
        scores.logps[counts],
        columns["old_logps"][counts],
        scores.entropies[counts],
        PolicyLoss(*(part[counts] for part in policy)),
        value,
    )
    return total, metrics


def _kl_term(logps: Tensor, ref_logps: Tensor, counts: Tensor, layout: Layout, args: PPOConfig) -> Tensor:
    if args.kl_estimator == "k3":
        return _sum(k3(logps, ref_logps), counts)
    # Per token, k2 would leave out what a token does to the divergence of those that follow.
    whole, reference = (
        sequence_logps(torch.where(counts, values, 0), layout.sequence_index, layout.num_sequences)
        for values in (logps, ref_logps)
    )
    return k2(whole, reference).sum()


def _sum(values: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, values, 0).sum()
