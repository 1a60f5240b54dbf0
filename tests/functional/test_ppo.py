"""PPO's losses and shaped rewards, by hand, with their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.functional.ppo import clipped_policy_loss, clipped_value_loss, shaped_rewards

EPSILON = 0.2


def test_policy_loss_by_hand() -> None:
    """ρ = 1.5, 1.5, 0.5, 0.5, 1.1 with A = 2, −2, 2, −2, 2: only a step too far in the good direction is clipped."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0], dtype=torch.float64)
    logps = ratio.log().requires_grad_()
    found = clipped_policy_loss(logps, torch.zeros(5), advantages, cliprange=EPSILON)
    assert found.losses.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2], rel=1e-6)
    assert found.ratio.tolist() == pytest.approx(ratio.tolist(), rel=1e-6)
    assert found.is_clipped.tolist() == [True, False, False, True, False]
    (grad,) = torch.autograd.grad(found.losses.sum(), logps)
    assert grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.2], rel=1e-6)  # −A ρ where it is not clipped
    assert not found.ratio.requires_grad


def test_policy_loss_at_the_old_policy_is_the_policy_gradient() -> None:
    logps = torch.tensor([-0.3, -2.0, -7.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 2.0])
    found = clipped_policy_loss(logps, logps.detach(), advantages, cliprange=EPSILON)
    assert (found.ratio == 1).all()
    assert not found.is_clipped.any()
    assert torch.equal(torch.autograd.grad(found.losses.sum(), logps)[0], -advantages)


def test_policy_loss_without_a_clip_is_importance_sampling() -> None:
    logps = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found = clipped_policy_loss(logps, torch.zeros(3), advantages, cliprange=1e9)
    torch.testing.assert_close(found.losses, -advantages * logps.exp())
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, torch.zeros(3), advantages, cliprange=EPSILON).losses, logps
    )


def test_value_loss_by_hand() -> None:
    """Old value 0, reach ½. V = 1 → clip ½: R = 2: ½ max(1, 2.25); R = −1: ½ max(4, 2.25). V = .3, R = 1: ½ · .49."""
    values = torch.tensor([1.0, 1.0, 0.3, -1.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([2.0, -1.0, 1.0, -2.0], dtype=torch.float64)
    found = clipped_value_loss(values, torch.zeros(4), returns, cliprange_value=0.5)
    assert found.losses.tolist() == pytest.approx([1.125, 2.0, 0.245, 1.125], rel=1e-6)
    assert found.is_clipped.tolist() == [True, False, False, True]
    (grad,) = torch.autograd.grad(found.losses.sum(), values)
    assert grad.tolist() == pytest.approx([0.0, 2.0, -0.7, 0.0], rel=1e-6)  # V − R where it is not clipped


def test_value_loss_at_the_old_values_is_half_the_squared_error() -> None:
    values = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = clipped_value_loss(values, values.detach(), returns, cliprange_value=0.2)
    torch.testing.assert_close(found.losses, (values - returns) ** 2 / 2)
    assert not found.is_clipped.any()
    old = torch.tensor([0.1, -1.05], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, old, returns, cliprange_value=0.2).losses, values)


MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])


def test_shaped_rewards_by_hand() -> None:
    """The score joins the last valid token, padding stays at zero, whatever it holds."""
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.4, math.nan, 9.0], [0.0, 1.0, 9.0]])
    found = shaped_rewards(torch.tensor([1.0, -1.0, 0.5]), kl, MASK, kl_coef=0.1)
    expected = [-0.01, 0.02, 0.97, -1.04, 0.0, 0.0, 0.0, 0.4, 0.0]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_shaped_rewards_sum_to_score_minus_penalty() -> None:
    generator = torch.Generator().manual_seed(0)
    kl, scores = torch.randn(3, 3, generator=generator).double(), torch.randn(3, generator=generator).double()
    found = shaped_rewards(scores, kl, MASK, kl_coef=0.3).sum(1)
    torch.testing.assert_close(found, scores - 0.3 * torch.where(MASK, kl, 0).sum(1))
    alone = shaped_rewards(scores, kl, MASK, kl_coef=0.0)
    assert torch.equal(
        alone[MASK], torch.stack([torch.zeros(()), torch.zeros(()), *scores[:2], *alone[2, :2]]).double()
    )
    assert torch.autograd.gradcheck(
        lambda s, k: shaped_rewards(s, k, MASK, kl_coef=0.3), (scores.requires_grad_(), kl.requires_grad_())
    )


def test_an_episode_without_tokens_gets_no_reward() -> None:
    found = shaped_rewards(torch.ones(1), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool), kl_coef=0.1)
    assert (found == 0).all()
