"""Mathematics on tensors: pure functions that import torch and nothing else of this package but its errors.

The losses themselves are in `alignkit.functional.preference` (`preference.sigmoid`, `preference.ipo`, ...).
"""

from __future__ import annotations

from alignkit.functional.advantages import Advantages, gae, leave_one_out
from alignkit.functional.divergence import (
    DIVERGENCES,
    Divergence,
    DivergenceSpec,
    alpha_divergence,
    forward_kl,
    get_divergence,
    js_divergence,
    reverse_kl,
)
from alignkit.functional.kl import KL_PLACES, KLPlace, adaptive_kl_coef, k1, k2, k3
from alignkit.functional.masked import (
    Moments,
    masked_mean,
    masked_moments,
    masked_scale,
    masked_var,
    masked_whiten,
    pool_moments,
)
from alignkit.functional.ppo import PolicyLoss, ValueLoss, clipped_policy_loss, clipped_value_loss, shaped_rewards
from alignkit.functional.preference import (
    LOSSES,
    LossOptions,
    LossSpec,
    PairLogps,
    PairTokens,
    PreferenceLoss,
    combine,
    get_loss,
)
from alignkit.functional.reward import EnsembleRewards, RewardLoss, bradley_terry, ensemble
from alignkit.functional.sequence import ld_dpo_logps, sequence_logps, split_pairs, wpo_weights
from alignkit.functional.statistics import RunningMoments, calibration_error, explained_variance, pearson

__all__ = [
    "DIVERGENCES",
    "KL_PLACES",
    "LOSSES",
    "Advantages",
    "Divergence",
    "DivergenceSpec",
    "EnsembleRewards",
    "KLPlace",
    "LossOptions",
    "LossSpec",
    "Moments",
    "PairLogps",
    "PairTokens",
    "PolicyLoss",
    "PreferenceLoss",
    "RewardLoss",
    "RunningMoments",
    "ValueLoss",
    "adaptive_kl_coef",
    "alpha_divergence",
    "bradley_terry",
    "calibration_error",
    "clipped_policy_loss",
    "clipped_value_loss",
    "combine",
    "ensemble",
    "explained_variance",
    "forward_kl",
    "gae",
    "get_divergence",
    "get_loss",
    "js_divergence",
    "k1",
    "k2",
    "k3",
    "ld_dpo_logps",
    "leave_one_out",
    "masked_mean",
    "masked_moments",
    "masked_scale",
    "masked_var",
    "masked_whiten",
    "pearson",
    "pool_moments",
    "reverse_kl",
    "sequence_logps",
    "shaped_rewards",
    "split_pairs",
    "wpo_weights",
]
