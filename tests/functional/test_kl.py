"""KL estimators: golden numbers, expectations, gradients; the adaptive coefficient."""

from __future__ import annotations

import pytest
import torch

from alignkit.functional.kl import KL_PLACES, adaptive_kl_coef, k1, k2, k3

POLICY = torch.tensor([0.5, 0.2, -1.0, 0.9], dtype=torch.float64).log_softmax(0)
REF = torch.tensor([-0.3, 0.8, 0.1, 0.0], dtype=torch.float64).log_softmax(0)
KL = (POLICY.exp() * (POLICY - REF)).sum()  # from the policy to the reference
OTHER_KL = (REF.exp() * (REF - POLICY)).sum()


@pytest.mark.parametrize(
    ("estimator", "up", "down"),
    [(k1, 0.3, -0.3), (k2, 0.045, 0.045), (k3, 0.0408182, 0.0498588)],  # e^∓0.3 − 1 ± 0.3
)
def test_golden_numbers_at_a_log_ratio_of_three_tenths(estimator, up, down) -> None:
    logps, ref_logps = torch.tensor([-1.0, -1.3]).double(), torch.tensor([-1.3, -1.0]).double()
    assert estimator(logps, ref_logps).tolist() == pytest.approx([up, down], rel=1e-5)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_expectation_under_the_policy_is_the_divergence(estimator) -> None:
    expected = (POLICY.exp() * estimator(POLICY, REF)).sum()
    torch.testing.assert_close(expected, KL)
    assert abs(expected - OTHER_KL) > 0.02


def test_k2_is_the_divergence_to_second_order() -> None:
    step = 1e-3 * torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.float64)
    policy = (REF + step).log_softmax(0)
    exact = (policy.exp() * (policy - REF)).sum()
    assert (policy.exp() * k2(policy, REF)).sum().item() == pytest.approx(exact.item(), rel=1e-3)


def test_k2_and_k3_are_never_negative_and_all_vanish_at_the_reference() -> None:
    log_ratio = torch.linspace(-5, 5, 41)
    zero = torch.zeros_like(log_ratio)
    for estimator in (k2, k3):
        assert (estimator(log_ratio, zero) >= 0).all()
    for estimator in (k1, k2, k3):
        assert (estimator(log_ratio, log_ratio) == 0).all()


def test_k3_keeps_its_digits_near_the_reference() -> None:
    """At d = 1e-4 it is 5e-9, which `exp(−d) − 1` in fp32 would lose."""
    assert k3(torch.tensor([1e-4]), torch.zeros(1)).item() == pytest.approx(5e-9, rel=2e-2)


@pytest.mark.parametrize(("estimator", "slope"), [(k1, 1.0), (k2, 0.3), (k3, 0.2591818)])
def test_gradient_by_hand(estimator, slope) -> None:
    """d/dd: 1, d, 1 − exp(−d)."""
    logps = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(estimator(logps, torch.tensor([-1.3], dtype=torch.float64)).sum(), logps)
    assert grad.item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradcheck(estimator) -> None:
    logps = POLICY.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: estimator(x, REF), logps)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.151536),  # error 1, clipped to 0.2: 0.15 · (1 + 0.2 · 512 / 10000)
        (3.0, 0.148464),  # error −1/2, clipped to −0.2
        (6.6, 0.150768),  # error 0.1
        (6.0, 0.15),
        (-1.0, 0.148464),
    ],
)
def test_adaptive_coefficient(kl, expected) -> None:
    found = adaptive_kl_coef(0.15, kl, target=6.0, horizon=10_000, episodes=512)
    assert found == pytest.approx(expected, rel=1e-6)


def test_adaptive_coefficient_changes_by_a_fifth_at_most_over_its_horizon() -> None:
    assert adaptive_kl_coef(1.0, 1e9, target=6.0, horizon=512, episodes=512) == pytest.approx(1.2, rel=1e-12)


def test_the_table_covers_every_pair_and_allows_one_exact_estimator_per_place() -> None:
    assert set(KL_PLACES) == {(k, place) for k in ("k1", "k2", "k3") for place in ("reward", "loss")}
    verdicts = {pair: entry.verdict for pair, entry in KL_PLACES.items()}
    assert [pair for pair, verdict in verdicts.items() if verdict == "exact"] == [("k1", "reward"), ("k2", "loss")]
    assert [pair for pair, verdict in verdicts.items() if verdict == "biased"] == [("k3", "loss")]
