"""From token log-probabilities to sequence log-probabilities, with numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.functional.preference_types import PairTokens
from alignkit.functional.sequence import ld_dpo_logps, sequence_logps, split_pairs, wpo_weights

# Two pairs: completions of 3, 1, 2 and 4 tokens, flat and, on purpose, not in order of sequence.
INDEX = torch.tensor([2, 0, 0, 3, 1, 3, 0, 2, 3, 3])
POSITION = torch.tensor([0, 0, 1, 0, 0, 1, 2, 1, 2, 3])
LOGPS = torch.tensor([-1.0, -2.0, -3.0, -0.5, -4.0, -0.25, -5.0, -6.0, -7.0, -8.0], dtype=torch.float64)
TOKENS = PairTokens(chosen=torch.tensor([3, 2]), rejected=torch.tensor([1, 4]))


def test_sums_by_sequence() -> None:
    assert sequence_logps(LOGPS, INDEX, 4).tolist() == [-10.0, -4.0, -7.0, -15.75]


def test_a_sequence_without_tokens_sums_to_zero() -> None:
    assert sequence_logps(LOGPS, INDEX, 6).tolist()[4:] == [0.0, 0.0]


def test_half_precision_is_summed_in_float32() -> None:
    sums = sequence_logps(torch.full((4096,), -1.0, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.int64), 1)
    assert sums.dtype == torch.float32
    assert sums.item() == -4096.0


def test_pairs_are_split_in_order() -> None:
    pairs = split_pairs(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert pairs.chosen.tolist() == [0.0, 2.0]
    assert pairs.rejected.tolist() == [1.0, 3.0]


def test_ld_dpo_weighs_tokens_beyond_the_shared_length() -> None:
    # pair 0 shares 1 token: -2 + 0.5 * (-3 - 5), and -4; pair 1 shares 2: -7, and -0.75 + 0.5 * -15
    sums = ld_dpo_logps(LOGPS, INDEX, POSITION, TOKENS, alpha=0.5)
    assert sums.tolist() == [-6.0, -4.0, -7.0, -8.25]


def test_ld_dpo_reduces_to_plain_sums_and_to_truncation() -> None:
    plain = sequence_logps(LOGPS, INDEX, 4)
    assert torch.equal(ld_dpo_logps(LOGPS, INDEX, POSITION, TOKENS, alpha=1.0), plain)
    assert ld_dpo_logps(LOGPS, INDEX, POSITION, TOKENS, alpha=0.0).tolist() == [-2.0, -4.0, -7.0, -0.75]


def test_wpo_weights_are_products_of_mean_aligned_probabilities() -> None:
    log_sum_sq = torch.full_like(LOGPS, math.log(0.5))
    # means over tokens of logp: -10/3, -4, -7/2, -63/16; each completion adds log 2
    expected = [math.exp(-10 / 3 - 4 + 2 * math.log(2)), math.exp(-3.5 - 63 / 16 + 2 * math.log(2))]
    assert wpo_weights(LOGPS, log_sum_sq, INDEX, TOKENS).tolist() == pytest.approx(expected, rel=1e-12)


def test_wpo_weight_of_uniform_predictions_is_one() -> None:
    # p = 1/V everywhere, so sum p^2 = 1/V: the aligned probability is 1
    logps = torch.full((10,), -math.log(50.0), dtype=torch.float64)
    assert wpo_weights(logps, logps, INDEX, TOKENS).tolist() == pytest.approx([1.0, 1.0], rel=1e-12)


def test_gradients_reach_sums_and_not_weights() -> None:
    logps = LOGPS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, INDEX, 4), (logps,))
    assert torch.autograd.gradcheck(lambda x: ld_dpo_logps(x, INDEX, POSITION, TOKENS, alpha=0.3), (logps,))
    assert not wpo_weights(logps, torch.zeros_like(logps), INDEX, TOKENS).requires_grad
