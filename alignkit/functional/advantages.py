"""How much better a token, or a whole completion, turned out than expected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignkit.errors import ConfigError


class Advantages(NamedTuple):
    """Per token `(B, T)`, zeros where the mask is False."""

    advantages: Tensor
    returns: Tensor  # what the value function should have said: advantages + values


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation, Eqs. 11, 12 and 16 of arXiv 1506.02438.

    `δ_t = r_t + γ V_{t+1} − V_t`, `A_t = δ_t + γλ A_{t+1}`, for t from the last token down to 0. An episode ends after
    its last token, whether with EOS or for want of room: there V and A are 0. `V_t` is the value of the state in which
    token t was chosen (prompt and tokens before t), `r_t` the reward for choosing it. With λ = 1 the returns are the
    discounted sums of rewards, whatever the values; with λ = 0 the advantages are δ.

    Args:
        rewards: `(B, T)`.
        values: `(B, T)`.
        mask: boolean `(B, T)`, True for the tokens of an episode, which lie side by side from column 0.
        gamma: discount per token, in [0, 1].
        lam: λ in [0, 1].

    Returns:
        Advantages and returns, `(B, T)`. Gradients would flow to rewards and values; give detached ones.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    columns: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Past the end everything is 0, so a shorter episode starts from zeros at its own last token.
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        columns.append(next_advantage)
    advantages = torch.stack(columns[::-1], dim=1)  # (B, T)
    return Advantages(advantages, advantages + values)


def leave_one_out(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """RLOO's advantages, arXiv 2402.14740, Section 3.3: `A_i = s_i − mean of s_j over the others of the group`.

    The baseline does not depend on completion i, so the policy gradient is unbiased without a value function.

    Args:
        scores: one score per completion (the KL penalty included), `(P, G)` for G completions of each of P prompts.
        mask: boolean `(P, G)`, False for completions that were dropped; None counts all. A completion that is alone in
            its group, having nothing to be compared with, gets 0.

    Returns:
        `(P, G)`, zeros where the mask is False.

    Raises:
        ConfigError: G is 1.
    """
    if scores.shape[1] < 2:
        raise ConfigError(
            "leave-one-out advantages compare the completions of one prompt, and found 1 for each; set num_generations "
            "to at least 2, or use a value function."
        )
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    scores = torch.where(mask, scores, 0)
    others = mask.sum(1, keepdim=True) - 1  # (P, 1)
    baseline = (scores.sum(1, keepdim=True) - scores) / others.clamp(min=1)
    return torch.where(mask & (others > 0), scores - baseline, 0)
