"""Proximal policy optimisation: clipped losses of policy and value, and the rewards that carry the KL penalty.

The losses are elementwise: any shape goes in and comes out, and nothing is averaged. `masked_mean` of
`alignkit.functional.masked` does that, over the tokens that count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """Per token, all of the input's shape."""

    losses: Tensor
    ratio: Tensor  # π / π_old, detached
    is_clipped: Tensor  # boolean: the clipped branch is the one that counts, so the token has no gradient


class ValueLoss(NamedTuple):
    """Per token, both of the input's shape."""

    losses: Tensor
    is_clipped: Tensor  # boolean: the clipped branch is the one that counts, so the token has no gradient


def clipped_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, cliprange: float) -> PolicyLoss:
    """PPO's clipped surrogate, Eq. 7 of arXiv 1707.06347, with the sign of a loss.

    `max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε))` with `ρ = exp(log π − log π_old)`. At `π = π_old` its gradient is
    `−A ∇ log π`, the policy gradient.

    Args:
        logps: log π of the tokens, with gradient, in nats.
        old_logps: log π of the policy that wrote them, from the rollout.
        advantages: A, detached.
        cliprange: ε.
    """
    ratio = torch.exp(logps - old_logps)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return PolicyLoss(torch.maximum(unclipped, clipped), ratio.detach(), clipped > unclipped)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float) -> ValueLoss:
    """Squared error whose reach is limited as the policy's is, Eq. 1 of arXiv 2005.12729 (PPO's own code has it).

    `½ max((V − R)², (V_clip − R)²)` with `V_clip = clip(V, V_old − ε, V_old + ε)`. The half is part of the loss here.

    Args:
        values: V, with gradient.
        old_values: V at the time of the rollout.
        returns: R, detached.
        cliprange_value: ε, in units of reward.
    """
    near = torch.maximum(torch.minimum(values, old_values + cliprange_value), old_values - cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return ValueLoss(torch.maximum(unclipped, clipped) / 2, clipped > unclipped)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Rewards per token, Eq. 2 of arXiv 2203.02155: `−β · kl_t` for each, and the score for the last one.

    Args:
        scores: one per episode, `(B,)`.
        kl: an estimate per token in nats, `(B, T)`, detached: `k1(old_logps, ref_logps)`. Zeros where the penalty is a
            term of the loss instead.
        mask: boolean `(B, T)`, True for the tokens of an episode, which lie side by side from column 0; EOS is one of
            them. An episode without tokens has no place for its score, and gets zeros.
        kl_coef: β.

    Returns:
        `(B, T)`, zeros where the mask is False.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    is_last = columns == mask.sum(1, keepdim=True) - 1  # (B, T)
    return torch.where(mask, -kl_coef * kl, 0) + torch.where(is_last, scores.unsqueeze(1), 0)
