"""What preference losses take and return.

A row of a batch is one pair: a prompt with a chosen and a rejected completion. A loss never sees tokens, padding or
packing, only one summed log-probability per completion, so the layout of a batch cannot change its value.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PairLogps(NamedTuple):
    """One model's log-probabilities of both completions of each pair, summed over completion tokens (nats)."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)


class PairTokens(NamedTuple):
    """How many completion tokens the sums of a `PairLogps` run over."""

    chosen: Tensor  # (B,) integer
    rejected: Tensor  # (B,) integer

    def mean_logps(self, logps: PairLogps) -> PairLogps:
        """Divide sums by lengths: log-probability per token. An empty completion counts as one token."""
        return PairLogps(logps.chosen / self.chosen.clamp(min=1), logps.rejected / self.rejected.clamp(min=1))


class PreferenceLoss(NamedTuple):
    """The result of a preference loss. The batch loss is the mean of `losses`."""

    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,) detached
    rejected_rewards: Tensor  # (B,) detached


def log_ratios(policy: PairLogps, ref: PairLogps) -> PairLogps:
    """Return `log pi(y|x) - log pi_ref(y|x)` of both completions, each (B,)."""
    return PairLogps(policy.chosen - ref.chosen, policy.rejected - ref.rejected)


def with_rewards(losses: Tensor, scores: PairLogps, beta: float) -> PreferenceLoss:
    """Attach the implicit rewards `beta * score`, detached, to `losses` (B,)."""
    return PreferenceLoss(losses, beta * scores.chosen.detach(), beta * scores.rejected.detach())
