"""Figures that say how a run is doing. None has a gradient that anybody should use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.functional.masked import Moments, masked_moments, masked_var, pool_moments


@dataclass(slots=True)
class RunningMoments:
    """Count, mean and population variance of everything seen so far, in double precision.

    The state is three numbers of Python, so that it goes through JSON and back unchanged.

    Attributes:
        count: how many values were seen.
        mean: 0 before the first value.
        variance: 0 before the second value.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def std(self) -> float:
        """Square root of the variance."""
        return self.variance**0.5

    def update(self, values: Tensor) -> None:
        """Take in `values`, of any shape and possibly none."""
        values = values.detach().double().cpu()
        found = masked_moments(values, torch.ones_like(values, dtype=torch.bool))
        self.merge(RunningMoments(values.numel(), found.mean.item(), found.variance.item()))

    def merge(self, other: RunningMoments) -> None:
        """Take in what `other` has seen, as if its values had been given here."""
        pairs = ((self.count, other.count), (self.mean, other.mean), (self.variance, other.variance))
        pooled = pool_moments(Moments(*(torch.tensor(pair, dtype=torch.float64) for pair in pairs)))
        self.count += other.count
        self.mean, self.variance = pooled.mean.item(), pooled.variance.item()

    def state_dict(self) -> dict[str, float]:
        """Return the state."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Set the state to what `state_dict` returned."""
        self.count, self.mean, self.variance = int(state["count"]), state["mean"], state["variance"]


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """`1 − Var(returns − values) / Var(returns)` over the tokens that count, a scalar.

    1: the value function knows the returns; 0: no better than a constant; negative: worse than one. NaN where the
    returns are all equal, because there is nothing to explain.

    Args:
        values: any shape.
        returns: the same shape.
        mask: boolean, the same shape.
    """
    values, returns = values.double(), returns.double()  # equal returns then have a variance of exactly 0
    variance = masked_var(returns, mask)
    ratio = masked_var(returns - values, mask) / variance
    return torch.where(variance > 0, 1 - ratio, torch.nan)


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation `cov(x, y) / (std(x) std(y))`, a scalar in [−1, 1]; NaN if either is constant.

    Args:
        first: `(N,)`.
        second: `(N,)`.
    """
    x, y = (values.double() - values.double().mean() for values in (first, second))
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int) -> Tensor:
    """Expected calibration error, Eq. 3 of arXiv 1706.04599: `Σ_b (n_b / N) |mean outcome − mean probability|`.

    Bins have equal width over [0, 1]. For pairs, whose better side is always named first, call with
    `max(p, 1 − p)` and `p > 1/2`: how sure the model is, and whether it is right.

    Args:
        probabilities: stated chances, `(N,)` in [0, 1].
        outcomes: boolean `(N,)`, what came.
        bins: how many.
    """
    probabilities = probabilities.double()
    index = (probabilities * bins).long().clamp(max=bins - 1)  # (N,); a probability of 1 is in the last bin
    gaps = torch.zeros(bins, dtype=torch.float64, device=probabilities.device)
    gaps.index_add_(0, index, outcomes.double() - probabilities)  # n_b · (mean outcome − mean probability)
    return gaps.abs().sum() / len(probabilities)
