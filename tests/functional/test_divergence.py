"""Scores of the f-divergences against closed forms, and their behaviour at extremes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.functional.divergence import (
    DIVERGENCES,
    alpha_divergence,
    forward_kl,
    get_divergence,
    js_divergence,
    reverse_kl,
)

# f of D_f(pi || pi_ref) = E_ref[f(t)]; the score is f'(t), up to a constant
GENERATORS: list[tuple[str, float, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("reverse_kl", 0.5, lambda t: t * t.log()),
    ("forward_kl", 0.5, lambda t: -t.log()),
    ("js_divergence", 0.5, lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log()),
    ("alpha_divergence", 0.5, lambda t: (t**0.5 - 1) / (0.5 * (0.5 - 1))),
    ("alpha_divergence", 3.0, lambda t: (t**3 - 1) / (3.0 * (3.0 - 1))),
]


@pytest.mark.parametrize(("name", "coef", "generator"), GENERATORS)
def test_score_is_the_derivative_of_the_generator(name: str, coef: float, generator: Callable) -> None:
    log_ratio = torch.linspace(-2, 2, 9, dtype=torch.float64)
    ratio = log_ratio.exp().requires_grad_()
    (derivative,) = torch.autograd.grad(generator(ratio).sum(), ratio)
    offset = get_divergence(name, alpha_coef=coef)(log_ratio) - derivative  # a constant: differences of scores agree
    torch.testing.assert_close(offset, offset[:1].expand(9), rtol=1e-9, atol=1e-12)


def test_golden_scores() -> None:
    log_ratio = torch.tensor([2.0, -1.0], dtype=torch.float64)
    assert reverse_kl(log_ratio).tolist() == [2.0, -1.0]
    assert forward_kl(log_ratio).tolist() == pytest.approx([0.864665, -1.718282], rel=1e-6)
    assert js_divergence(log_ratio).tolist() == pytest.approx([0.566219, -0.620115], rel=1e-6)
    assert alpha_divergence(0.5)(log_ratio).tolist() == pytest.approx([1.264241, -1.297443], rel=1e-6)


def test_alpha_of_one_is_reverse_kl_and_of_zero_is_forward_kl() -> None:
    log_ratio = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert alpha_divergence(1.0) is reverse_kl
    torch.testing.assert_close(alpha_divergence(1.0 + 1e-5)(log_ratio), log_ratio, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(alpha_divergence(0.0)(log_ratio), forward_kl(log_ratio), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_matches_finite_differences(name: str) -> None:
    log_ratio = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(get_divergence(name), (log_ratio,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_scores_increase_and_are_finite_at_extremes(name: str, dtype: torch.dtype) -> None:
    log_ratio = torch.tensor([-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4], dtype=dtype, requires_grad=True)
    scores = get_divergence(name)(log_ratio)
    (grad,) = torch.autograd.grad(scores.sum(), log_ratio)
    assert torch.isfinite(scores).all()
    assert torch.isfinite(grad).all()
    assert (scores.diff() >= 0).all()
    assert (scores[2:5].diff() > 0).all()


def test_scores_vanish_at_the_reference() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for name in DIVERGENCES:
        assert get_divergence(name)(zero).item() == pytest.approx(0.0, abs=1e-15)


def test_only_the_alpha_divergence_reads_the_coefficient() -> None:
    log_ratio = torch.tensor([1.5])
    for name, spec in DIVERGENCES.items():
        same = torch.equal(spec.build(0.25)(log_ratio), spec.build(0.75)(log_ratio))
        assert same != spec.reads_coef
        assert spec.name == name


def test_unknown_divergence_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'forward-kl'.*Did you mean 'forward_kl'\?"):
        get_divergence("forward-kl")


def test_js_score_is_bounded_by_log_two() -> None:
    assert js_divergence(torch.tensor([1e4])).item() == pytest.approx(math.log(2), rel=1e-6)
