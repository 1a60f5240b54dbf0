"""Mathematics on tensors: pure functions that import torch and nothing else of this package but its errors.

The losses themselves are in `alignkit.functional.preference` (`preference.sigmoid`, `preference.ipo`, ...).
"""

from __future__ import annotations

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
from alignkit.functional.sequence import ld_dpo_logps, sequence_logps, split_pairs, wpo_weights

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "Divergence",
    "DivergenceSpec",
    "LossOptions",
    "LossSpec",
    "PairLogps",
    "PairTokens",
    "PreferenceLoss",
    "alpha_divergence",
    "combine",
    "forward_kl",
    "get_divergence",
    "get_loss",
    "js_divergence",
    "ld_dpo_logps",
    "reverse_kl",
    "sequence_logps",
    "split_pairs",
    "wpo_weights",
]
