"""Estimators of the KL divergence from the reference, where each may be used, and the adaptive coefficient.

The estimators are J. Schulman's, "Approximating KL Divergence" (2020), for tokens drawn from the policy and
`d = log π − log π_ref`. All are elementwise and keep their shape. In expectation k1 and k3 are the KL divergence; k2 is
half the squared log-ratio, close to it while the two policies are close.

An unbiased *value* says nothing about the *gradient*. `KL_PLACES` says which estimator, in which place, makes
`π* ∝ π_ref · exp(r / β)` the policy at which training comes to rest. Two things decide it besides the table:

- k2 as a loss term needs the log-probabilities of whole completions, `k2(Σ_t logps_t, Σ_t ref_logps_t)`. Summed over
  single tokens it leaves out what a token does to the divergence of those that follow, and training rests where each
  token is weighed as if the rest of the completion were free. In the reward, k1 per token is right: returns add it up.
- Whitened advantages fit k1 in the reward, whose penalty is scaled along with the score. Beside a loss term they raise
  the score's share as the policy becomes surer, without end: use neither advantage nor reward whitening there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`d = log π − log π_ref` in nats: unbiased; a single value may be negative."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`d² / 2`: never negative; its gradient, in expectation over the policy, is that of the KL divergence.

    The divergence is that of what the log-probabilities belong to: completions `(B,)`, or tokens one by one.
    """
    return (logps - ref_logps) ** 2 / 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`exp(−d) − 1 + d`: unbiased and never negative."""
    log_ratio = logps - ref_logps
    return torch.expm1(-log_ratio) + log_ratio


class KLPlace(NamedTuple):
    """What comes of an estimator in a place, for a reward r, a coefficient β, and tokens drawn from the policy.

    Attributes:
        verdict: `exact`: training rests at `π_ref · exp(r / β)`. `biased`: it rests, elsewhere. `refused`: it does
            not regularise.
        reason: why, as a clause for a message.
    """

    verdict: Literal["exact", "biased", "refused"]
    reason: str


# (estimator, place). "reward": −β · estimator joins each token's reward, as a number. "loss": β · estimator joins the
# loss, and the gradient flows through it.
KL_PLACES: dict[tuple[str, str], KLPlace] = {
    ("k1", "reward"): KLPlace("exact", "its policy gradient is E[d ∇ log π] = ∇KL(π ‖ π_ref)"),
    ("k2", "loss"): KLPlace("exact", "of whole completions, its gradient is E[d ∇ log π] = ∇KL(π ‖ π_ref)"),
    ("k3", "loss"): KLPlace(
        "biased",
        "its gradient is that of the other direction, ∇KL(π_ref ‖ π); training rests at π_ref · β / (c − r), which "
        "keeps more of what the reference writes and the reward dislikes",
    ),
    ("k1", "loss"): KLPlace("refused", "its gradient is E[∇ log π] = 0, noise alone: nothing holds the policy"),
    ("k2", "reward"): KLPlace(
        "refused",
        "a token that became less likely than under the reference is punished for it and becomes rarer still: the "
        "policy collapses onto the tokens that it writes more often than the reference",
    ),
    ("k3", "reward"): KLPlace(
        "refused",
        "its policy gradient is ∇KL(π ‖ π_ref) − ∇KL(π_ref ‖ π), and the second term, which is unbounded, drives the "
        "policy away from the reference: training diverges",
    ),
}


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """The KL coefficient for the next rollout, Eqs. 2 and 3 of arXiv 1909.08593.

    `e = clip((kl − target) / target, −0.2, 0.2)`, `β ← β · (1 + e · episodes / horizon)`.

    Args:
        kl_coef: β of the rollout that was measured.
        kl: its KL from the reference in nats per episode: k1 summed over tokens, averaged over episodes.
        target: the KL to hold, in nats per episode, positive.
        horizon: episodes over which β can change by about 20 %; far larger than a rollout.
        episodes: how many episodes the rollout had, over all processes.
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
