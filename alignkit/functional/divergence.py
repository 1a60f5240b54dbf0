"""f-divergences for preference losses (f-DPO, arXiv 2309.16240).

When the policy is regularised towards the reference by an f-divergence `D_f(pi || pi_ref) = E_ref[f(pi / pi_ref)]`,
the implicit reward of a completion is `beta * f'(t)` up to a constant that depends on the prompt alone, with
`t = pi(y|x) / pi_ref(y|x)`. The functions here map the log-ratio `log t` to the score `f'(t)`,
elementwise and with constants dropped; reverse KL, whose score is the log-ratio itself, gives ordinary DPO.

The exponents of forward KL and of the alpha-divergence are clamped so that `exp` stays finite. Beyond the ceiling (80
nats in float32) a score is constant and has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.errors import ConfigError, nearest

Divergence = Callable[[Tensor], Tensor]

_LARGEST_EXPONENT = {torch.float16: 10.0, torch.bfloat16: 80.0, torch.float32: 80.0, torch.float64: 700.0}


def _expm1(exponent: Tensor) -> Tensor:
    """`exp(x) - 1` with `x` clamped from above so that the result is finite in the dtype of `x`."""
    return torch.expm1(exponent.clamp(max=_LARGEST_EXPONENT[exponent.dtype]))


def reverse_kl(log_ratio: Tensor) -> Tensor:
    """`f(t) = t log t`, so `f'(t) = log t` after dropping the constant 1: the score of DPO. Shape is kept."""
    return log_ratio


def forward_kl(log_ratio: Tensor) -> Tensor:
    """`f(t) = -log t`, so `f'(t) = -1/t`; shifted by 1, the score is `1 - exp(-log t)`. Shape is kept."""
    return -_expm1(-log_ratio)


def js_divergence(log_ratio: Tensor) -> Tensor:
    """Jensen-Shannon: `f'(t) = log(2t / (1 + t)) = log 2 + logsigmoid(log t)`. Shape is kept; at most log 2."""
    return math.log(2.0) + F.logsigmoid(log_ratio)


def alpha_divergence(coef: float) -> Divergence:
    """Return the score `f'(t) = (t^(coef - 1) - 1) / (coef - 1)` of an alpha-divergence.

    `coef = 1` is the limit `log t` (reverse KL) and `coef = 0` is forward KL.

    Args:
        coef: the exponent alpha, any real number.
    """
    power = coef - 1.0
    if abs(power) < 1e-6:
        return reverse_kl

    def score(log_ratio: Tensor) -> Tensor:
        return _expm1(power * log_ratio) / power

    return score


@dataclass(frozen=True)
class DivergenceSpec:
    """One row of `DIVERGENCES`."""

    name: str
    summary: str
    build: Callable[[float], Divergence]  # takes the alpha coefficient, which only some divergences read
    reads_coef: bool


DIVERGENCES: dict[str, DivergenceSpec] = {
    spec.name: spec
    for spec in (
        DivergenceSpec("reverse_kl", "score log t: ordinary DPO", lambda _: reverse_kl, False),
        DivergenceSpec("forward_kl", "score 1 - 1/t: covers the reference's modes", lambda _: forward_kl, False),
        DivergenceSpec("js_divergence", "score log(2t / (1 + t)): bounded above", lambda _: js_divergence, False),
        DivergenceSpec("alpha_divergence", "score (t^(a-1) - 1) / (a-1): in between", alpha_divergence, True),
    )
}


def get_divergence(name: str, *, alpha_coef: float = 0.5) -> Divergence:
    """Return the score function called `name`.

    Args:
        name: a key of `DIVERGENCES`.
        alpha_coef: the exponent of `alpha_divergence`; the other divergences do not depend on it.

    Raises:
        ConfigError: `name` is unknown.
    """
    if name not in DIVERGENCES:
        raise ConfigError(f"unknown f-divergence {name!r}; one of {sorted(DIVERGENCES)}.{nearest(name, DIVERGENCES)}")
    return DIVERGENCES[name].build(alpha_coef)
