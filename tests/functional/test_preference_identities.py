"""How the losses reduce to one another, and what is specific to one of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from alignkit.errors import ConfigError
from alignkit.functional import preference as p
from alignkit.functional.divergence import alpha_divergence
from alignkit.functional.preference import PairLogps, PairTokens

BETA = 0.3


def logps(seed: int, rows: int = 6) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    return PairLogps(*(-5 - 10 * torch.rand(2, rows, generator=generator, dtype=torch.float64)))


POLICY, REF = logps(1), logps(2)
RATIOS = PairLogps(POLICY.chosen - REF.chosen, POLICY.rejected - REF.rejected)
TOKENS = PairTokens(torch.tensor([3, 5, 8, 2, 9, 4]), torch.tensor([7, 5, 1, 6, 3, 2]))
ONE_TOKEN = PairTokens(torch.ones(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64))


def swapped(pair: PairLogps) -> PairLogps:
    return PairLogps(pair.rejected, pair.chosen)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_sigmoid_without_options_is_dpo() -> None:
    delta = RATIOS.chosen - RATIOS.rejected
    close(p.sigmoid(POLICY, REF, beta=BETA).losses, torch.log1p(torch.exp(-BETA * delta)))


def test_label_smoothing_is_the_expectation_over_flips() -> None:
    kept, flipped = p.sigmoid(POLICY, REF, beta=BETA), p.sigmoid(swapped(POLICY), swapped(REF), beta=BETA)
    smoothed = p.sigmoid(POLICY, REF, beta=BETA, label_smoothing=0.2)
    close(smoothed.losses, 0.8 * kept.losses + 0.2 * flipped.losses)


def test_margin_is_a_shift_of_the_reward_difference() -> None:
    margin = torch.linspace(0, 1, 6, dtype=torch.float64)
    moved = POLICY._replace(chosen=POLICY.chosen - margin / BETA)
    close(p.sigmoid(POLICY, REF, beta=BETA, margin=margin).losses, p.sigmoid(moved, REF, beta=BETA).losses)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    kept = p.robust(POLICY, REF, beta=BETA, label_smoothing=0.2).losses
    flipped = p.robust(swapped(POLICY), swapped(REF), beta=BETA, label_smoothing=0.2).losses
    clean = p.sigmoid(POLICY, REF, beta=BETA).losses
    close(0.8 * kept + 0.2 * flipped, clean)
    close(p.robust(POLICY, REF, beta=BETA).losses, clean)


@pytest.mark.parametrize("label_smoothing", [0.5, 0.9, -0.1])
def test_robust_refuses_flip_chances_without_an_estimator(label_smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"robust.*label_smoothing < 0\.5"):
        p.robust(POLICY, REF, beta=BETA, label_smoothing=label_smoothing)


def test_sigmoid_norm_with_equal_lengths_is_sigmoid_with_beta_per_token() -> None:
    tokens = PairTokens(torch.full((6,), 4), torch.full((6,), 4))
    close(p.sigmoid_norm(POLICY, REF, beta=BETA, tokens=tokens).losses, p.sigmoid(POLICY, REF, beta=BETA / 4).losses)


def test_ipo_of_single_tokens_is_ipo_sum() -> None:
    close(p.ipo(POLICY, REF, beta=BETA, tokens=ONE_TOKEN).losses, p.ipo_sum(POLICY, REF, beta=BETA).losses)


def test_an_empty_completion_counts_as_one_token() -> None:
    empty = PairTokens(torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))
    close(p.ipo(POLICY, REF, beta=BETA, tokens=empty).losses, p.ipo_sum(POLICY, REF, beta=BETA).losses)


def test_hinge_is_linear_below_its_margin_and_zero_above() -> None:
    ref = PairLogps(torch.zeros(2), torch.zeros(2))
    losses = p.hinge(PairLogps(torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, -9.0])), ref, beta=0.5).losses
    assert losses.tolist() == [1.5, 0.0]


def test_exo_vanishes_where_the_policy_matches_the_smoothed_label() -> None:
    epsilon = 0.05
    at_label = PairLogps(torch.tensor([math.log((1 - epsilon) / epsilon) / BETA], dtype=torch.float64), torch.zeros(1))
    ref = PairLogps(torch.zeros(1), torch.zeros(1))
    assert p.exo_pair(at_label, ref, beta=BETA, label_smoothing=epsilon).losses.item() == pytest.approx(0, abs=1e-12)
    assert (p.exo_pair(POLICY, REF, beta=BETA, label_smoothing=epsilon).losses > 0).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 1.0])
def test_exo_refuses_a_hard_label(label_smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"exo_pair.*label_smoothing.*1e-3"):
        p.exo_pair(POLICY, REF, beta=BETA, label_smoothing=label_smoothing)


def test_discopop_with_a_flat_blend_is_the_mean_of_its_parts() -> None:
    logits = BETA * (RATIOS.chosen - RATIOS.rejected)
    expected = 0.5 * (torch.exp(-logits) - F.logsigmoid(logits))
    losses = p.discopop(POLICY, REF, beta=BETA, discopop_tau=1e12).losses
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


def test_dpop_without_penalty_is_dpo_and_penalises_only_falling_chosen_completions() -> None:
    plain = p.sigmoid(POLICY, REF, beta=BETA).losses
    close(p.dpop(POLICY, REF, beta=BETA, dpop_lambda=0.0).losses, plain)
    penalised = p.dpop(POLICY, REF, beta=BETA, dpop_lambda=5.0).losses
    fell = RATIOS.chosen < 0
    assert fell.any()
    assert not fell.all()
    assert torch.equal(penalised > plain, fell)


def test_dpop_golden_number_with_penalty() -> None:
    # a = -0.5, b = -1, lambda = 5: x = 0.1 * (-0.5 + 1 - 2.5) = -0.2
    policy = PairLogps(torch.tensor([-7.5]), torch.tensor([-16.0]))
    ref = PairLogps(torch.tensor([-7.0]), torch.tensor([-15.0]))
    assert p.dpop(policy, ref, beta=0.1, dpop_lambda=5.0).losses.item() == pytest.approx(0.798139, rel=1e-5)


def test_nca_differs_from_bco_in_whom_it_pushes_down() -> None:
    chosen, rejected = BETA * RATIOS.chosen, BETA * RATIOS.rejected
    difference = 0.5 * (F.logsigmoid(-rejected) - F.logsigmoid(-chosen))
    close(p.nca_pair(POLICY, REF, beta=BETA).losses, p.bco_pair(POLICY, REF, beta=BETA).losses + difference)


def test_sppo_vanishes_at_its_targets() -> None:
    half = torch.tensor([0.5 / BETA], dtype=torch.float64)
    zero = PairLogps(torch.zeros(1), torch.zeros(1))
    assert p.sppo_hard(PairLogps(half, -half), zero, beta=BETA).losses.item() == pytest.approx(0, abs=1e-20)


def test_apo_down_of_an_unmoved_rejected_completion_is_one() -> None:
    policy = POLICY._replace(rejected=REF.rejected)
    close(p.apo_down(policy, REF, beta=BETA).losses, torch.ones(6, dtype=torch.float64))


def test_apo_zero_is_kto_without_kl_on_both_completions() -> None:
    zero = torch.zeros(())
    every, none = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    up = p.kto(POLICY, REF, beta=BETA, label=every, kl=zero).losses
    down = p.kto(swapped(POLICY), swapped(REF), beta=BETA, label=none, kl=zero).losses
    close(p.apo_zero(POLICY, REF, beta=BETA).losses, up + down)


def test_aot_of_one_row_is_dpo() -> None:
    policy, ref = logps(3, rows=1), logps(4, rows=1)
    expected = p.sigmoid(policy, ref, beta=BETA, label_smoothing=0.1).losses
    close(p.aot(policy, ref, beta=BETA, label_smoothing=0.1).losses, expected)
    close(p.aot_unpaired(policy, ref, beta=BETA, label_smoothing=0.1).losses, expected)


RANK_LOSSES = torch.tensor([0.744397, 0.693147, 0.644397])  # log(1 + e^0.1), log 2, log(1 + e^-0.1)


def test_aot_compares_ranks_not_rows() -> None:
    # policy margins (3, -1, 1), reference margins (0, 2, 1): ranks give (-1, 0, 1), rows would give (3, -3, 0)
    policy = PairLogps(torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-4.0, -2.0, -3.0]))
    ref = PairLogps(torch.tensor([-2.0, -2.0, -5.0]), torch.tensor([-2.0, -4.0, -6.0]))
    torch.testing.assert_close(p.aot(policy, ref, beta=0.1).losses, RANK_LOSSES, rtol=1e-5, atol=0)


def test_aot_unpaired_compares_ranks_of_log_ratios() -> None:
    # a = (3, -1, 1), b = (0, 2, 1), the same numbers
    policy = PairLogps(torch.tensor([-1.0, -5.0, -3.0]), torch.tensor([-4.0, -2.0, -3.0]))
    ref = PairLogps(torch.tensor([-4.0, -4.0, -4.0]), torch.tensor([-4.0, -4.0, -4.0]))
    torch.testing.assert_close(p.aot_unpaired(policy, ref, beta=0.1).losses, RANK_LOSSES, rtol=1e-5, atol=0)


def test_sft_mean_is_the_mean_over_the_tokens_of_the_batch() -> None:
    losses = p.sft(POLICY, None, beta=BETA, tokens=TOKENS).losses
    close(losses.mean(), -POLICY.chosen.sum() / TOKENS.chosen.sum())
    close(losses / losses.sum(), POLICY.chosen / POLICY.chosen.sum())  # and each row keeps its own part


def test_sft_rewards_without_reference_are_log_probabilities() -> None:
    close(p.sft(POLICY, None, beta=BETA, tokens=TOKENS).chosen_rewards, BETA * POLICY.chosen)
    close(p.sft(POLICY, REF, beta=BETA, tokens=TOKENS).chosen_rewards, BETA * RATIOS.chosen)


def test_simpo_without_target_is_cpo_without_likelihood_on_means() -> None:
    simpo = p.simpo(POLICY, None, beta=BETA, tokens=TOKENS, simpo_gamma=0.0)
    cpo = p.cpo(TOKENS.mean_logps(POLICY), None, beta=BETA, tokens=TOKENS, cpo_alpha=0.0)
    close(simpo.losses, cpo.losses)


def test_orpo_without_odds_ratio_is_the_likelihood_of_each_row() -> None:
    close(p.orpo(POLICY, None, beta=0.0, tokens=TOKENS).losses, -POLICY.chosen / TOKENS.chosen)


def test_orpo_is_finite_where_a_completion_is_certain() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    one = PairTokens(torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    losses = p.orpo(PairLogps(chosen, rejected), None, beta=1.0, tokens=one).losses
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log(2), rel=1e-6)
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()
    assert rejected.grad is not None
    assert torch.isfinite(rejected.grad).all()


@pytest.mark.parametrize("name", ["sft", "orpo", "cpo"])
def test_likelihood_terms_read_the_unweighted_sums(name: str) -> None:
    half = PairLogps(POLICY.chosen / 2, POLICY.rejected / 2)  # as LD-DPO might have weighted them
    function = p.LOSSES[name].function
    weighted = function(half, None, beta=BETA, tokens=TOKENS).losses
    plain = function(half, None, beta=BETA, tokens=TOKENS, unweighted=POLICY).losses
    missing = POLICY.chosen / 2 / (TOKENS.chosen.double().mean() if name == "sft" else TOKENS.chosen)
    close(plain - weighted, -missing)


def test_kto_estimates_the_kl_from_mismatched_rows_without_gradient() -> None:
    # log-ratios of the mismatched rows are 4 and 1, so kl = 2.5
    policy = PairLogps(torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -7.0], requires_grad=True))
    ref = PairLogps(torch.tensor([-5.0, -6.0]), torch.tensor([-8.0, -8.0]))
    policy.chosen.requires_grad_()
    result = p.kto(policy, ref, beta=0.1, label=torch.tensor([True, False]), desirable_weight=2.0)
    expected = [2 / (1 + math.exp(0.1 * (2 - 2.5))), 1 / (1 + math.exp(0.1 * (2.5 + 3)))]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert result.chosen_rewards.tolist() == pytest.approx([0.2, 0.0])
    assert result.rejected_rewards.tolist() == pytest.approx([0.0, -0.3])
    result.losses.sum().backward()
    assert policy.rejected.grad is None
    assert policy.chosen.grad is not None


def test_kto_never_uses_a_negative_kl() -> None:
    label = torch.ones(6, dtype=torch.bool)
    negative = p.kto(POLICY, REF, beta=BETA, label=label, kl=torch.tensor(-4.0)).losses
    close(negative, p.kto(POLICY, REF, beta=BETA, label=label, kl=torch.tensor(0.0)).losses)


def test_alpha_divergence_of_one_leaves_dpo_alone() -> None:
    expected = p.sigmoid(POLICY, REF, beta=BETA).losses
    close(p.sigmoid(POLICY, REF, beta=BETA, divergence=alpha_divergence(1.0)).losses, expected)
