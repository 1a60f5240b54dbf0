"""Preference losses that look at the difference between a pair's two scores.

Notation: `a = log pi(y_w|x) - log pi_ref(y_w|x)` for the chosen completion, `b` likewise for the rejected one, `f'` the
score of an f-divergence (`divergence`, the identity for reverse KL), and `delta = f'(a) - f'(b)`. Tensors are `(B,)`.
The rewards of every loss here are `beta * a` and `beta * b`, whatever the divergence, as TRL logs them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.functional.divergence import Divergence, reverse_kl
from alignkit.functional.preference_types import PairLogps, PairTokens, PreferenceLoss, log_ratios, with_rewards


def _smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """`-(1 - eps) log sigma(x) - eps log sigma(-x)`: cross-entropy with a label that is flipped with chance eps."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _delta(ratios: PairLogps, divergence: Divergence) -> Tensor:
    return divergence(ratios.chosen) - divergence(ratios.rejected)


def _mean_delta(ratios: PairLogps, tokens: PairTokens, divergence: Divergence) -> Tensor:
    # The score is taken of the summed log-ratio and then divided by the length, in TRL's order.
    scores = tokens.mean_logps(PairLogps(divergence(ratios.chosen), divergence(ratios.rejected)))
    return scores.chosen - scores.rejected


def sigmoid(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    divergence: Divergence = reverse_kl,
) -> PreferenceLoss:
    """DPO, Eq. 7 of arXiv 2305.18290: `-log sigma(beta * delta)`.

    With `label_smoothing` eps it is conservative DPO, `-(1-eps) log sigma(x) - eps log sigma(-x)` (TRL's `sigmoid`
    ignores the option). With `margin` it is ODPO (arXiv 2402.10571), `x = beta * delta - margin`.

    Args:
        policy: log-probabilities under the model in training.
        ref: log-probabilities under the reference.
        beta: strength of the pull towards the reference.
        label_smoothing: chance, in [0, 0.5), that a label is the wrong way round.
        margin: (B,) by how much the chosen reward should exceed the rejected one, in units of reward.
        divergence: score of the f-divergence.
    """
    ratios = log_ratios(policy, ref)
    logits = beta * _delta(ratios, divergence)
    if margin is not None:
        logits = logits - margin
    return with_rewards(_smoothed_logistic(logits, label_smoothing), ratios, beta)


def robust(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = reverse_kl,
) -> PreferenceLoss:
    """Robust DPO, arXiv 2403.00409: `(-(1-eps) log sigma(x) + eps log sigma(-x)) / (1 - 2 eps)`, `x = beta * delta`.

    If each label is flipped with chance eps, its expectation over the flips is the DPO loss on clean labels. A single
    row's loss can be negative.

    Args:
        label_smoothing: the flip chance eps.

    Raises:
        ConfigError: eps outside [0, 0.5), where the estimator does not exist.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ConfigError(f"'robust' needs 0 <= label_smoothing < 0.5 (a flip chance), got {label_smoothing}")
    ratios = log_ratios(policy, ref)
    logits = beta * _delta(ratios, divergence)
    clean = -(1 - label_smoothing) * F.logsigmoid(logits)
    flipped = -label_smoothing * F.logsigmoid(-logits)
    return with_rewards((clean - flipped) / (1 - 2 * label_smoothing), ratios, beta)


def sigmoid_norm(
    policy: PairLogps, ref: PairLogps, *, beta: float, tokens: PairTokens, divergence: Divergence = reverse_kl
) -> PreferenceLoss:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): `-log sigma(beta * (f'(a)/|y_w| - f'(b)/|y_l|))`.

    The paper uses a beta around 5, because per-token log-ratios are small. Rewards stay sums, as TRL logs them.
    """
    ratios = log_ratios(policy, ref)
    return with_rewards(-F.logsigmoid(beta * _mean_delta(ratios, tokens, divergence)), ratios, beta)


def hinge(policy: PairLogps, ref: PairLogps, *, beta: float, divergence: Divergence = reverse_kl) -> PreferenceLoss:
    """Hinge loss of SLiC (arXiv 2305.10425) on DPO's reward difference: `max(0, 1 - beta * delta)`."""
    ratios = log_ratios(policy, ref)
    return with_rewards(torch.relu(1 - beta * _delta(ratios, divergence)), ratios, beta)


def ipo(
    policy: PairLogps, ref: PairLogps, *, beta: float, tokens: PairTokens, divergence: Divergence = reverse_kl
) -> PreferenceLoss:
    """IPO, Eq. 17 of arXiv 2310.12036, on per-token means: `(f'(a)/|y_w| - f'(b)/|y_l| - 1/(2 beta))^2`.

    TRL's form, which its authors confirmed with the paper's. `ipo_sum` is the equation as printed. `beta` is tau there.
    """
    ratios = log_ratios(policy, ref)
    losses = (_mean_delta(ratios, tokens, divergence) - 1 / (2 * beta)) ** 2
    return with_rewards(losses, ratios, beta)


def ipo_sum(policy: PairLogps, ref: PairLogps, *, beta: float, divergence: Divergence = reverse_kl) -> PreferenceLoss:
    """IPO as printed, Eq. 17 of arXiv 2310.12036, on sums over tokens: `(delta - 1/(2 beta))^2`, `beta` being tau."""
    ratios = log_ratios(policy, ref)
    return with_rewards((_delta(ratios, divergence) - 1 / (2 * beta)) ** 2, ratios, beta)


def exo_pair(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float,
    label_smoothing: float,
    divergence: Divergence = reverse_kl,
) -> PreferenceLoss:
    """EXO for pairs, Eq. 16 of arXiv 2402.00856: `KL(q || p)`, with `q = (sigma(x), sigma(-x))`, `x = beta * delta`.

    The target `p = (1 - eps, eps)` is the label smoothed by eps.

    Args:
        label_smoothing: eps; the paper recommends 1e-3.

    Raises:
        ConfigError: eps outside (0, 1), where the target has an infinite log-probability.
    """
    if not 0.0 < label_smoothing < 1.0:
        raise ConfigError(
            f"'exo_pair' needs 0 < label_smoothing < 1, got {label_smoothing}: it takes log(label_smoothing); "
            "the paper recommends label_smoothing=1e-3"
        )
    ratios = log_ratios(policy, ref)
    logits = beta * _delta(ratios, divergence)
    chosen_term = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected_term = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return with_rewards(chosen_term + rejected_term, ratios, beta)


def discopop(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float,
    discopop_tau: float = 0.05,
    divergence: Divergence = reverse_kl,
) -> PreferenceLoss:
    """DiscoPOP (log-ratio modulated loss), Eq. 5 of arXiv 2406.08414, with `x = beta * delta`.

    `(1 - m) * (-log sigma(x)) + m * exp(-x)`, `m = sigma(x / tau)`. The second term is formed as
    `exp(-x + log sigma(x / tau))`, which is finite for every x if tau <= 1; `m * exp(-x)` is `0 * inf` below x = -88.

    Args:
        discopop_tau: temperature tau of the blend, positive; above 1 the loss itself grows like `exp(|x|)`.
    """
    ratios = log_ratios(policy, ref)
    logits = beta * _delta(ratios, divergence)
    logistic = -F.logsigmoid(logits) * torch.sigmoid(-logits / discopop_tau)
    exponential = torch.exp(-logits + F.logsigmoid(logits / discopop_tau))
    return with_rewards(logistic + exponential, ratios, beta)


def dpop(policy: PairLogps, ref: PairLogps, *, beta: float, dpop_lambda: float = 50.0) -> PreferenceLoss:
    """DPO-Positive (Smaug), Eq. 3 of arXiv 2402.13228: `-log sigma(beta * (a - b - lambda * max(0, -a)))`.

    The penalty is paid when the chosen completion becomes less likely than under the reference, which DPO allows as
    long as the rejected one falls faster.

    Args:
        dpop_lambda: weight lambda of the penalty, in nats per nat, inside beta's bracket. The paper uses 50.
    """
    ratios = log_ratios(policy, ref)
    penalty = dpop_lambda * torch.relu(-ratios.chosen)
    return with_rewards(-F.logsigmoid(beta * (ratios.chosen - ratios.rejected - penalty)), ratios, beta)
