"""Means and whitening over valid tokens, by hand, and blind to what stands in the padding."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.functional.masked import (
    Moments,
    masked_mean,
    masked_moments,
    masked_scale,
    masked_var,
    masked_whiten,
    pool_moments,
)

VALUES = torch.tensor([[1.0, 2.0, 100.0], [6.0, -50.0, 70.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])  # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3
STD = math.sqrt(14 / 3)


def test_by_hand() -> None:
    assert masked_mean(VALUES, MASK).item() == pytest.approx(3.0, rel=1e-12)
    assert masked_var(VALUES, MASK).item() == pytest.approx(14 / 3, rel=1e-12)
    whitened = masked_whiten(VALUES, MASK)
    assert whitened.flatten().tolist() == pytest.approx([-2 / STD, -1 / STD, 0, 3 / STD, 0, 0], rel=1e-5)
    scaled = masked_scale(VALUES, MASK)
    assert scaled.flatten().tolist() == pytest.approx([1 / STD, 2 / STD, 0, 6 / STD, 0, 0], rel=1e-5)


def test_whitened_values_have_mean_zero_and_variance_one_over_valid_tokens() -> None:
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 6, 2, 8, 3])[:, None]
    found = masked_moments(masked_whiten(values, mask), mask)
    assert found.count.item() == 33
    assert found.mean.item() == pytest.approx(0.0, abs=1e-12)
    assert found.variance.item() == pytest.approx(1.0, rel=1e-6)
    scaled = masked_moments(masked_scale(values, mask), mask)
    assert scaled.variance.item() == pytest.approx(1.0, rel=1e-6)
    assert scaled.mean.item() == pytest.approx((masked_mean(values, mask) / masked_var(values, mask).sqrt()).item())


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten, masked_scale])
@pytest.mark.parametrize("junk", [1e30, math.nan, math.inf])
def test_padding_is_never_read(function, junk) -> None:
    values = torch.where(MASK, VALUES, junk).requires_grad_()
    found = function(values, MASK)
    torch.testing.assert_close(found, function(VALUES, MASK), rtol=0, atol=0)
    (grad,) = torch.autograd.grad((found * torch.arange(1.0, 1 + found.numel()).view(found.shape)).sum(), values)
    assert (grad[~MASK] == 0).all()
    assert torch.isfinite(grad).all()
    assert (grad[MASK] != 0).any()


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten, masked_scale])
def test_gradcheck(function) -> None:
    assert torch.autograd.gradcheck(lambda v: function(v, MASK), VALUES.clone().requires_grad_())


def test_a_full_mask_is_the_plain_statistic() -> None:
    full = torch.ones_like(MASK)
    torch.testing.assert_close(masked_mean(VALUES, full), VALUES.mean())
    torch.testing.assert_close(masked_var(VALUES, full), VALUES.var(correction=0))


def test_the_layout_does_not_matter() -> None:
    """Flat tokens and padded rows give the same numbers."""
    torch.testing.assert_close(
        masked_whiten(VALUES[MASK], torch.ones(3, dtype=torch.bool)), masked_whiten(VALUES, MASK)[MASK]
    )


def test_nothing_valid_gives_zeros() -> None:
    none = torch.zeros_like(MASK)
    values = VALUES.clone().requires_grad_()
    assert masked_mean(values, none).item() == 0
    assert masked_var(values, none).item() == 0
    assert (masked_whiten(values, none) == 0).all()
    (grad,) = torch.autograd.grad(masked_mean(values, none), values)
    assert (grad == 0).all()


def test_equal_values_are_whitened_to_zeros() -> None:
    assert (masked_whiten(torch.full((2, 3), 0.5), MASK) == 0).all()


def test_pooled_moments_are_those_of_all_values() -> None:
    """Two processes and an empty one: 1, 2 | 6 | nothing."""
    rows = [masked_moments(VALUES[i], MASK[i]) for i in (0, 1)]
    rows.append(masked_moments(VALUES[0], torch.zeros(3, dtype=torch.bool)))
    pooled = pool_moments(Moments(*map(torch.stack, zip(*rows, strict=True))))
    for found, expected in zip(pooled, masked_moments(VALUES, MASK), strict=True):
        torch.testing.assert_close(found, expected)
    apart = [function(VALUES[:1], MASK[:1], pooled) for function in (masked_whiten, masked_scale)]
    together = [function(VALUES, MASK)[:1] for function in (masked_whiten, masked_scale)]
    torch.testing.assert_close(apart, together)
    assert not torch.allclose(apart[0], masked_whiten(VALUES[:1], MASK[:1]))


def test_pooling_nothing_gives_zeros() -> None:
    zeros = torch.zeros(2)
    assert [moment.item() for moment in pool_moments(Moments(zeros, zeros, zeros))] == [0, 0, 0]
