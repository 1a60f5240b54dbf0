"""The reward model's loss and what an ensemble says, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.functional import preference
from alignkit.functional.preference import PairLogps
from alignkit.functional.reward import bradley_terry, ensemble

CHOSEN = torch.tensor([[1.0, 0.2], [-0.5, 0.0]], dtype=torch.float64)
REJECTED = torch.tensor([[0.0, 0.7], [0.5, -2.0]], dtype=torch.float64)


def test_one_head_by_hand() -> None:
    """Margins 1 and −1: ln(1 + e^∓1)."""
    found = bradley_terry(CHOSEN[:, :1], REJECTED[:, :1])
    assert found.losses.tolist() == pytest.approx([0.3132617, 1.3132617], rel=1e-6)
    assert found.margins.flatten().tolist() == [1.0, -1.0]
    assert not bradley_terry(CHOSEN.clone().requires_grad_(), REJECTED).margins.requires_grad


def test_heads_are_averaged() -> None:
    """Second head: margins −0.5 and 2, losses 0.9740770 and 0.1269280."""
    found = bradley_terry(CHOSEN, REJECTED)
    assert found.losses.tolist() == pytest.approx([(0.3132617 + 0.9740770) / 2, (1.3132617 + 0.1269280) / 2], rel=1e-6)
    alone = [bradley_terry(CHOSEN[:, k : k + 1], REJECTED[:, k : k + 1]).losses for k in range(2)]
    torch.testing.assert_close(found.losses, sum(alone) / 2)


def test_margin_is_subtracted() -> None:
    """Logits 1 − 0.4 and −1 + 0.4; what is reported as margin stays the rewards' own."""
    found = bradley_terry(CHOSEN[:, :1], REJECTED[:, :1], margin=torch.tensor([0.4, -0.4]).double())
    assert found.losses.tolist() == pytest.approx([0.4374880, 1.0374880], rel=1e-6)
    assert found.margins.flatten().tolist() == [1.0, -1.0]


def test_label_smoothing_by_hand() -> None:
    """0.9 · 0.3132617 + 0.1 · 1.3132617."""
    found = bradley_terry(CHOSEN[:1, :1], REJECTED[:1, :1], label_smoothing=0.1)
    assert found.losses.item() == pytest.approx(0.4132617, rel=1e-6)


def test_centering_by_hand() -> None:
    """+ 0.01 · (1 + 0)² and + 0.01 · 0²; shifting both rewards changes this term alone."""
    found = bradley_terry(CHOSEN[:, :1], REJECTED[:, :1], center_coef=0.01)
    assert found.losses.tolist() == pytest.approx([0.3232617, 1.3132617], rel=1e-6)
    torch.testing.assert_close(bradley_terry(CHOSEN + 5, REJECTED + 5).losses, bradley_terry(CHOSEN, REJECTED).losses)
    shifted = bradley_terry(CHOSEN[:, :1] + 5, REJECTED[:, :1] + 5, center_coef=0.01)
    assert shifted.losses.tolist() == pytest.approx([0.3132617 + 1.21, 1.3132617 + 1.0], rel=1e-6)


def test_gradient_by_hand() -> None:
    """d/dr_w = −σ(−x) per head, halved by the mean over two heads."""
    chosen = CHOSEN.clone().requires_grad_()
    (grad,) = torch.autograd.grad(bradley_terry(chosen, REJECTED).losses.sum(), chosen)
    assert grad[0].tolist() == pytest.approx([-0.2689414 / 2, -0.6224593 / 2], rel=1e-6)
    options = {"margin": torch.tensor([0.3, -0.1]), "label_smoothing": 0.1, "center_coef": 0.05}
    assert torch.autograd.gradcheck(
        lambda w, r: bradley_terry(w, r, **options).losses, (chosen, REJECTED.clone().requires_grad_())
    )


def test_it_is_dpo_on_rewards() -> None:
    """With β = 1 and log-ratios in place of rewards, margin and smoothing included."""
    zeros = torch.zeros(2, dtype=torch.float64)
    margin = torch.tensor([0.3, -0.1], dtype=torch.float64)
    expected = preference.sigmoid(
        PairLogps(CHOSEN[:, 0], REJECTED[:, 0]), PairLogps(zeros, zeros), beta=1.0, label_smoothing=0.1, margin=margin
    )
    found = bradley_terry(CHOSEN[:, :1], REJECTED[:, :1], label_smoothing=0.1, margin=margin)
    torch.testing.assert_close(found.losses, expected.losses)


def test_large_margins_stay_finite() -> None:
    found = bradley_terry(torch.tensor([[1e4], [-1e4]]), torch.zeros(2, 1))
    assert found.losses.tolist() == [0.0, 1e4]


def test_ensemble_by_hand() -> None:
    found = ensemble(torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]]))
    assert found.mean.tolist() == [3.0, 2.0]
    assert found.minimum.tolist() == [1.0, 2.0]
    assert found.spread.tolist() == pytest.approx([math.sqrt(8 / 3), 0.0], rel=1e-6)


def test_an_ensemble_of_one_is_that_head() -> None:
    found = ensemble(torch.tensor([[1.0], [-2.0]]))
    assert found.mean.tolist() == found.minimum.tolist() == [1.0, -2.0]
    assert found.spread.tolist() == [0.0, 0.0]
