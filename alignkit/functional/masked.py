"""Means and whitening over the tokens that count.

`values` and `mask` have the same shape, whatever it is: `(B, T)` with padding, or flat `(S,)`. The mask is boolean,
True = counts. What stands where the mask is False is never read, so it may be anything, NaN included.

Variances are those of the population (divided by the count), so that whitened values have variance 1 exactly. TRL
divides by the count less one; at a thousand tokens the two differ by 0.05 % in the standard deviation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8  # added before the square root, as in TRL: equal values are whitened to zeros


class Moments(NamedTuple):
    """Count, mean and variance of some values: scalars `()`, or `(W,)` for W parts that were measured apart."""

    count: Tensor
    mean: Tensor
    variance: Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """`Σ values · mask / Σ mask`, a scalar; 0 (with a gradient of zero) if nothing counts."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance of the values that count, a scalar; 0 if nothing counts."""
    values = torch.where(mask, values, 0)
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def masked_moments(values: Tensor, mask: Tensor) -> Moments:
    """Count, mean and variance of the values that count, scalars in the dtype of `values`."""
    return Moments(mask.sum().to(values.dtype), masked_mean(values, mask), masked_var(values, mask))


def pool_moments(parts: Moments) -> Moments:
    """Moments of all values together from those of W parts (Chan, Golub and LeVeque 1983, Eq. 1.5, for any W).

    `n = Σ n_w`, `mean = Σ n_w mean_w / n`, `variance = Σ n_w (variance_w + (mean_w − mean)²) / n`. Parts without values
    do not matter. Several processes whiten alike when each pools what all of them measured.

    Args:
        parts: fields of shape `(W,)`.

    Returns:
        Scalars; all 0 if every part is empty.
    """
    share = parts.count / parts.count.sum().clamp(min=1)  # (W,)
    mean = (share * parts.mean).sum()
    return Moments(parts.count.sum(), mean, (share * (parts.variance + (parts.mean - mean) ** 2)).sum())


def masked_whiten(values: Tensor, mask: Tensor, moments: Moments | None = None) -> Tensor:
    """`(values − mean) / std` where the mask is True, zeros elsewhere: mean 0, variance 1 over what counts.

    Args:
        values: any shape.
        mask: boolean, the same shape.
        moments: mean and variance to use, scalars, for instance pooled over processes; None takes those of `values`.
    """
    values = torch.where(mask, values, 0)
    moments = masked_moments(values, mask) if moments is None else moments
    return torch.where(mask, (values - moments.mean) / _std(moments), 0)


def masked_scale(values: Tensor, mask: Tensor, moments: Moments | None = None) -> Tensor:
    """`values / std` where the mask is True, zeros elsewhere: variance 1, and the mean is not removed.

    Rewards are whitened this way. Dividing all of them by one number leaves the optimal policy as it is. Taking the
    mean out and adding it back after the division, as TRL and lm-human-preferences do, also adds the same amount to
    every token, which pays for length (or for brevity) wherever the number of tokens is the policy's own choice.

    Args:
        values: any shape.
        mask: boolean, the same shape.
        moments: variance to use, a scalar; None takes that of `values`.
    """
    values = torch.where(mask, values, 0)
    moments = masked_moments(values, mask) if moments is None else moments
    return values / _std(moments)


def _std(moments: Moments) -> Tensor:
    return (moments.variance + VARIANCE_FLOOR).sqrt()
