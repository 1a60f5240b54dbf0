"""Losses that do not compare with a reference model, so that none has to be run.

All take `ref` in second place like every loss. SimPO, ORPO and CPO ignore it, and their rewards are `beta` times the
log-probability that the loss uses. `sft` reads it for its rewards only, which then are log-ratios as TRL logs them.

`unweighted`, where a loss takes it, holds the policy's plain sums for the case that `policy` was weighted by LD-DPO
(`alignkit.functional.sequence.ld_dpo_logps`): a negative log-likelihood counts every token once. None means that
`policy` is plain already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.functional.preference_types import PairLogps, PairTokens, PreferenceLoss, log_ratios, with_rewards


def _chosen_nll(policy: PairLogps, tokens: PairTokens, unweighted: PairLogps | None) -> Tensor:
    """Negative log-likelihood per token of each chosen completion, (B,): every pair weighs the same."""
    return -tokens.mean_logps(policy if unweighted is None else unweighted).chosen


def sft(
    policy: PairLogps,
    ref: PairLogps | None,
    *,
    beta: float,
    tokens: PairTokens,
    unweighted: PairLogps | None = None,
) -> PreferenceLoss:
    """Negative log-likelihood of the chosen completions, averaged over all their tokens in the batch.

    Row i is `-log pi(y_w,i) * B / sum_j |y_w,j|`, so the mean over rows is TRL's batch loss,
    `-sum_i log pi(y_w,i) / sum_j |y_w,j|`, and row weights still act on their own row. (TRL repeats the batch mean on
    every row, so that WPO weights multiply the batch mean there.) `beta` scales the rewards only.
    """
    chosen = policy.chosen if unweighted is None else unweighted.chosen
    batch_tokens = tokens.chosen.sum().clamp(min=1)
    scores = policy if ref is None else log_ratios(policy, ref)
    return with_rewards(-chosen * chosen.numel() / batch_tokens, scores, beta)


def simpo(
    policy: PairLogps, ref: PairLogps | None, *, beta: float, tokens: PairTokens, simpo_gamma: float = 0.5
) -> PreferenceLoss:
    """SimPO, Eq. 6 of arXiv 2405.14734: `-log sigma(beta * (mean_logp(y_w) - mean_logp(y_l)) - gamma)`.

    Args:
        simpo_gamma: target reward margin gamma, in units of reward. Differences per token are small, so betas of 2 and
            more are usual here.
    """
    means = tokens.mean_logps(policy)
    return with_rewards(-F.logsigmoid(beta * (means.chosen - means.rejected) - simpo_gamma), means, beta)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """`log(p / (1 - p))` of `p = exp(mean_logps)`; p = 1 is taken as one step of precision below 1."""
    logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


def orpo(
    policy: PairLogps,
    ref: PairLogps | None,
    *,
    beta: float,
    tokens: PairTokens,
    unweighted: PairLogps | None = None,
) -> PreferenceLoss:
    """ORPO, Eqs. 6 and 7 of arXiv 2403.07691: `nll(y_w) - beta * log sigma(log odds(y_w) - log odds(y_l))`.

    `odds = p / (1 - p)`, with p the geometric mean of a completion's token probabilities. `beta` is lambda there.
    `nll` is the mean over the row's chosen tokens, as in the paper; TRL's ORPO trainer averages over all tokens of the
    batch, which agrees when lengths are equal. Rewards are `beta` times the mean log-probability.
    """
    means = tokens.mean_logps(policy)
    odds_ratio = -F.logsigmoid(_log_odds(means.chosen) - _log_odds(means.rejected))
    return with_rewards(_chosen_nll(policy, tokens, unweighted) + beta * odds_ratio, means, beta)


def cpo(
    policy: PairLogps,
    ref: PairLogps | None,
    *,
    beta: float,
    tokens: PairTokens,
    cpo_alpha: float = 1.0,
    unweighted: PairLogps | None = None,
) -> PreferenceLoss:
    """CPO, arXiv 2401.08417: `-log sigma(beta * (log pi(y_w) - log pi(y_l))) + alpha * nll(y_w)`.

    The preference term uses sums over tokens. `nll` is the mean over the row's chosen tokens; TRL's CPO trainer
    averages over all tokens of the batch, which agrees when lengths are equal. Rewards are `beta` times the summed
    log-probability.

    Args:
        cpo_alpha: weight alpha of the likelihood term.
    """
    preference = -F.logsigmoid(beta * (policy.chosen - policy.rejected))
    return with_rewards(preference + cpo_alpha * _chosen_nll(policy, tokens, unweighted), policy, beta)
