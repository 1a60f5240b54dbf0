"""DPO reaches the optimum that theory promises, and does not with a planted bug.

Vocabulary of 8, one-token response, known reward r. Labels follow Bradley-Terry, `P(i over j) = sigma(r_i - r_j)`. The
loss is its exact expectation over all ordered pairs, so there is no sampling noise, and the optimum is
`pi*(y) = pi_ref(y) exp(r(y) / beta) / Z` (Eq. 4 of arXiv 2305.18290).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from alignkit.functional import preference as p
from alignkit.functional.divergence import DIVERGENCES, get_divergence
from alignkit.functional.preference import PairLogps

VOCABULARY = 8
BETA = 0.5
Loss = Callable[[PairLogps, PairLogps], torch.Tensor]

REWARD = torch.tensor([0.9, -0.6, 0.3, 1.2, -1.0, 0.1, 0.6, -0.2], dtype=torch.float64)
REF_LOGPS = torch.tensor([0.5, 1.0, -0.7, -0.3, 0.2, 0.8, -1.1, 0.0], dtype=torch.float64).log_softmax(0)
OPTIMUM = (REF_LOGPS + REWARD / BETA).log_softmax(0)
CHOSEN, REJECTED = (index.flatten() for index in (~torch.eye(VOCABULARY, dtype=torch.bool)).nonzero().T)


def pairs(logps: torch.Tensor) -> PairLogps:
    """All 56 ordered pairs of different responses."""
    return PairLogps(logps[CHOSEN], logps[REJECTED])


def trained(loss: Loss, flip_chance: float = 0.0) -> torch.Tensor:
    """Minimise the expected loss from the reference on; returns the policy's log-probabilities (8,)."""
    preferred = torch.sigmoid(REWARD[CHOSEN] - REWARD[REJECTED])
    label_chance = (1 - flip_chance) * preferred + flip_chance * (1 - preferred)
    logits = REF_LOGPS.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = (label_chance * loss(pairs(logits.log_softmax(0)), pairs(REF_LOGPS))).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def kl(logps: torch.Tensor, other: torch.Tensor) -> float:
    return (logps.exp() * (logps - other)).sum().item()


def dpo(policy: PairLogps, ref: PairLogps) -> torch.Tensor:
    return p.sigmoid(policy, ref, beta=BETA).losses


def test_the_optimum_is_far_from_where_training_starts() -> None:
    assert kl(REF_LOGPS, OPTIMUM) > 0.3


def test_dpo_reaches_the_optimal_policy() -> None:
    policy = trained(dpo)
    assert kl(policy, OPTIMUM) < 1e-6
    torch.testing.assert_close(policy, OPTIMUM, rtol=1e-3, atol=0)


def sign_flipped(policy: PairLogps, ref: PairLogps) -> torch.Tensor:
    return p.sigmoid(PairLogps(policy.rejected, policy.chosen), PairLogps(ref.rejected, ref.chosen), beta=BETA).losses


def reference_swapped(policy: PairLogps, ref: PairLogps) -> torch.Tensor:
    return p.sigmoid(policy, PairLogps(ref.rejected, ref.chosen), beta=BETA).losses


def beta_missing(policy: PairLogps, ref: PairLogps) -> torch.Tensor:
    return p.sigmoid(policy, ref, beta=1.0).losses


def reference_missing(policy: PairLogps, ref: PairLogps) -> torch.Tensor:
    return p.sigmoid(policy, PairLogps(*map(torch.zeros_like, ref)), beta=BETA).losses


@pytest.mark.parametrize("loss", [sign_flipped, reference_swapped, beta_missing, reference_missing])
def test_a_planted_bug_misses_the_optimum(loss: Loss) -> None:
    assert kl(trained(loss), OPTIMUM) > 0.05


def robust_loss(policy: PairLogps, ref: PairLogps, label_smoothing: float) -> torch.Tensor:
    return p.robust(policy, ref, beta=BETA, label_smoothing=label_smoothing).losses


def test_robust_reaches_the_optimum_on_flipped_labels_and_dpo_does_not() -> None:
    assert kl(trained(partial(robust_loss, label_smoothing=0.2), flip_chance=0.2), OPTIMUM) < 1e-6
    assert kl(trained(dpo, flip_chance=0.2), OPTIMUM) > 0.05


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_recovers_the_reward_differences(name: str) -> None:
    # At the optimum beta * (f'(t_i) - f'(t_j)) = r_i - r_j. A larger beta keeps the bounded scores in reach.
    divergence, beta = get_divergence(name), 3.0

    def loss(policy: PairLogps, ref: PairLogps) -> torch.Tensor:
        return p.sigmoid(policy, ref, beta=beta, divergence=divergence).losses

    scores = beta * divergence(trained(loss) - REF_LOGPS)
    torch.testing.assert_close(scores - scores.mean(), REWARD - REWARD.mean(), rtol=1e-3, atol=1e-3)
