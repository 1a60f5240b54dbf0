"""GAE and leave-one-out: by hand, against numpy, and where they reduce to something simpler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.functional.advantages import gae, leave_one_out

LENGTHS = (6, 1, 4, 5, 2)


def case() -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards and values of five episodes, `(5, 6)`, and their mask."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    return rewards, values, torch.arange(6) < torch.tensor(LENGTHS)[:, None]


def test_golden_episode() -> None:
    """γ = 1, λ = .95. δ = (.09, .08, .67); A₂ = .67; A₁ = .08 + .95 · .67 = .7165; A₀ = .09 + .95 · .7165."""
    rewards = torch.tensor([[-0.01, -0.02, 0.97]], dtype=torch.float64)
    values = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    found = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.95)
    assert found.advantages[0].tolist() == pytest.approx([0.770675, 0.7165, 0.67], rel=1e-6)
    assert found.returns[0].tolist() == pytest.approx([0.870675, 0.9165, 0.97], rel=1e-6)


def test_golden_episode_with_a_discount() -> None:
    """γ = ½, λ = ½: δ = (1 + 1 − 1, 3 − 2) = (1, 1); A₀ = 1 + ¼ · 1."""
    found = gae(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 2.0]]), torch.ones(1, 2) > 0, gamma=0.5, lam=0.5)
    assert found.advantages.tolist() == [[1.25, 1.0]]
    assert found.returns.tolist() == [[2.25, 3.0]]


def numpy_gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Eq. 16 as written, a sum over the future: `A_t = Σ_l (γλ)^l δ_{t+l}`, for one episode."""
    following = np.append(values[1:], 0.0)
    deltas = rewards + gamma * following - values
    return np.array(
        [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_equals_numpy_episode_by_episode(gamma, lam) -> None:
    rewards, values, mask = case()
    found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS):
        expected = numpy_gae(rewards[row, :length].numpy(), values[row, :length].numpy(), gamma, lam)
        np.testing.assert_allclose(found.advantages[row, :length].numpy(), expected, rtol=1e-9)
        np.testing.assert_allclose(
            found.returns[row, :length].numpy(), expected + values[row, :length].numpy(), rtol=1e-9
        )
    assert (found.advantages[~mask] == 0).all()
    assert (found.returns[~mask] == 0).all()


def test_lambda_one_gives_sums_of_rewards_whatever_the_values() -> None:
    rewards, values, mask = case()
    found = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    rewards_to_go = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found.returns, torch.where(mask, rewards_to_go, 0))


def test_lambda_zero_gives_temporal_differences() -> None:
    rewards, values, mask = case()
    found = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    valid = torch.where(mask, values, 0)
    following = torch.cat([valid[:, 1:], torch.zeros(5, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(found.advantages, torch.where(mask, rewards + 0.9 * following - values, 0))


@pytest.mark.parametrize("junk", [1e6, math.nan])
def test_padding_is_never_read(junk) -> None:
    rewards, values, mask = case()
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    dirty = gae(torch.where(mask, rewards, junk), torch.where(mask, values, junk), mask, gamma=0.9, lam=0.8)
    assert torch.equal(clean.advantages, dirty.advantages)
    assert torch.equal(clean.returns, dirty.returns)


def test_true_values_leave_no_advantage() -> None:
    """If values are the discounted sums of rewards, nothing is a surprise, for any λ."""
    rewards, _, mask = case()
    returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, lam=1.0).returns
    for lam in (0.0, 0.7, 1.0):
        found = gae(rewards, returns, mask, gamma=0.9, lam=lam)
        torch.testing.assert_close(found.advantages, torch.zeros_like(rewards))
        torch.testing.assert_close(found.returns, returns)


def test_gradcheck() -> None:
    rewards, values, mask = case()
    assert torch.autograd.gradcheck(
        lambda r, v: gae(r, v, mask, gamma=0.9, lam=0.8), (rewards.requires_grad_(), values.requires_grad_())
    )


def test_leave_one_out_by_hand() -> None:
    """1, 2, 6: the others' means are 4, 7/2, 3/2. A pair: each is compared with the other."""
    found = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    assert found.flatten().tolist() == pytest.approx([-3, -1.5, 4.5, -1.5, -1.5, 3], rel=1e-6)
    assert leave_one_out(torch.tensor([[1.0, 4.0]])).tolist() == [[-3.0, 3.0]]


def test_leave_one_out_is_the_centred_score_stretched() -> None:
    """`A_i = G / (G − 1) · (s_i − mean)`: sums to zero within a group, and groups do not mix."""
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = leave_one_out(scores)
    torch.testing.assert_close(found, 5 / 4 * (scores - scores.mean(1, keepdim=True)))
    assert torch.equal(leave_one_out(scores[:1]), found[:1])
    assert torch.autograd.gradcheck(leave_one_out, scores.requires_grad_())


def test_leave_one_out_ignores_dropped_completions() -> None:
    scores = torch.tensor([[1.0, math.nan, 2.0, 6.0], [math.nan, 5.0, math.nan, math.nan]])
    found = leave_one_out(scores, torch.isfinite(scores))
    assert found.flatten().tolist() == pytest.approx([-3, 0, -1.5, 4.5, 0, 0, 0, 0], rel=1e-6)


def test_leave_one_out_needs_two_completions() -> None:
    with pytest.raises(ConfigError, match="set num_generations to at least 2"):
        leave_one_out(torch.zeros(4, 1))
