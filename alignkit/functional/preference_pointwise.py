"""Preference losses that judge each completion on its own, or compare whole batches by rank.

Notation: `a = log pi(y_w|x) - log pi_ref(y_w|x)` for the chosen completion, `b` likewise for the rejected one, both
`(B,)`. None of these has an f-divergence form. Unless a docstring says otherwise the rewards are `beta * a` and
`beta * b`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.functional.preference_types import PairLogps, PreferenceLoss, log_ratios, with_rewards


def nca_pair(policy: PairLogps, ref: PairLogps, *, beta: float) -> PreferenceLoss:
    """NCA for pairs, arXiv 2402.05369: `-log sigma(u) - 1/2 log sigma(-u) - 1/2 log sigma(-v)`.

    Here `u = beta * a` and `v = beta * b`. It optimises absolute likelihood rather than the difference, so the chosen
    completion does not become less likely.
    """
    ratios = log_ratios(policy, ref)
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return with_rewards(losses, ratios, beta)


def bco_pair(policy: PairLogps, ref: PairLogps, *, beta: float) -> PreferenceLoss:
    """Binary classifier optimisation, arXiv 2404.04656: `-log sigma(beta * a) - log sigma(-beta * b)`.

    As in TRL's DPO trainer the paper's running reward shift is zero.
    """
    ratios = log_ratios(policy, ref)
    losses = -F.logsigmoid(beta * ratios.chosen) - F.logsigmoid(-beta * ratios.rejected)
    return with_rewards(losses, ratios, beta)


def sppo_hard(policy: PairLogps, ref: PairLogps, *, beta: float) -> PreferenceLoss:
    """SPPO, Eq. 4.7 of arXiv 2405.00675 with hard win rates 1 and 0: `(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2`."""
    ratios = log_ratios(policy, ref)
    losses = (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2
    return with_rewards(losses, ratios, beta)


def apo_zero(policy: PairLogps, ref: PairLogps, *, beta: float) -> PreferenceLoss:
    """APO-zero, Eq. 7 of arXiv 2408.06266: `1 - sigma(beta * a) + sigma(beta * b)`.

    For data whose chosen completions are better than what the model writes: chosen up, rejected down.
    """
    ratios = log_ratios(policy, ref)
    losses = torch.sigmoid(-beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)
    return with_rewards(losses, ratios, beta)


def apo_down(policy: PairLogps, ref: PairLogps, *, beta: float) -> PreferenceLoss:
    """APO-down, Eq. 8 of arXiv 2408.06266: `sigma(beta * a) + 1 - sigma(beta * (a - b))`.

    For data whose chosen completions are worse than what the model writes: both down, the rejected one further.
    """
    ratios = log_ratios(policy, ref)
    losses = torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(-beta * (ratios.chosen - ratios.rejected))
    return with_rewards(losses, ratios, beta)


def _ranked_logistic(upper: Tensor, lower: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Smoothed logistic loss between the k-th smallest of `upper` and the k-th smallest of `lower`, both (B,)."""
    logits = beta * (upper.sort().values - lower.sort().values)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def aot(policy: PairLogps, ref: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PreferenceLoss:
    """AOT on paired data, arXiv 2406.05882: the policy's margins must dominate the reference's, rank by rank.

    `-log sigma(beta * (m_(k) - n_(k)))`, with `m = log pi(y_w) - log pi(y_l)` and `n` the same of the reference, each
    sorted over the batch. Rank k is not row k: `losses` are in order of rank and must not be weighted by row.

    Args:
        label_smoothing: eps of the smoothed logistic loss.
    """
    losses = _ranked_logistic(policy.chosen - policy.rejected, ref.chosen - ref.rejected, beta, label_smoothing)
    return with_rewards(losses, log_ratios(policy, ref), beta)


def aot_unpaired(policy: PairLogps, ref: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PreferenceLoss:
    """AOT on unpaired data, arXiv 2406.05882: chosen log-ratios must dominate rejected ones, rank by rank.

    `-log sigma(beta * (a_(k) - b_(k)))`, each sorted over the batch. `losses` are in order of rank, as in `aot`.

    Args:
        label_smoothing: eps of the smoothed logistic loss.
    """
    ratios = log_ratios(policy, ref)
    return with_rewards(_ranked_logistic(ratios.chosen, ratios.rejected, beta, label_smoothing), ratios, beta)


def kto(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float,
    label: Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: Tensor | None = None,
) -> PreferenceLoss:
    """KTO on unpaired rows, Eq. 7 of arXiv 2402.01306.

    `w_d * (1 - sigma(beta * (r - kl)))` for desirable rows, `w_u * (1 - sigma(beta * (kl - r)))` for undesirable ones,
    with the row's log-ratio `r`. `.chosen` of both models is the row's own completion. `.rejected` is a completion that
    belongs to another prompt, used only for `kl = max(0, mean(log pi - log pi_ref))`, which carries no gradient.

    Rewards: `chosen_rewards` is `beta * r` on desirable rows and 0 on the others, `rejected_rewards` is `beta * r` on
    undesirable rows and 0 on the others, so nothing is NaN. To log means as TRL does, divide the sum of the first by
    `label.sum()` and the sum of the second by `(~label).sum()`, and skip a side that has no rows.

    Args:
        label: (B,) boolean, True for desirable rows.
        desirable_weight: w_d.
        undesirable_weight: w_u.
        kl: scalar estimate in nats made elsewhere, for instance over all processes; clamped at 0 here. None estimates
            it from this batch.
    """
    rows, mismatched = log_ratios(policy, ref)
    kl = (mismatched.mean() if kl is None else kl).detach().clamp(min=0)
    losses = torch.where(
        label,
        desirable_weight * torch.sigmoid(-beta * (rows - kl)),
        undesirable_weight * torch.sigmoid(-beta * (kl - rows)),
    )
    zeros = torch.zeros_like(rows)
    split = PairLogps(chosen=torch.where(label, rows, zeros), rejected=torch.where(label, zeros, rows))
    return with_rewards(losses, split, beta)
