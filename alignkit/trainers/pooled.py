"""Figures that come out the same however their items were split over batches, rollouts and processes.

A mean of means depends on the split, and so does a correlation or a deviation. Each figure here is therefore kept as
the few sums that determine it: sums add up over everything, one collective call brings the processes together, and the
figure is read off at the end. Sums are in double precision and stay on the device until somebody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor

# Items are fp32: a deviation of less than a millionth of their size is rounding, and counts as none.
_RELATIVE_VARIANCE_FLOOR = 1e-12


class Pooled(NamedTuple):
    """One figure. Make it with the functions below.

    Attributes:
        kind: how it is read off, a key of `READERS`.
        sums: `(K,)`, double precision.
    """

    kind: str
    sums: Tensor

    def read(self) -> float | None:
        """Return the figure of what this process has seen; `None` where there is nothing to say."""
        return READERS[self.kind](self.sums.tolist())

    def merged(self, other: Pooled) -> Pooled:
        """Return the figure, of the same kind, of both's items together."""
        return Pooled(self.kind, self.sums.to(other.sums.device) + other.sums)


def mean(values: Tensor) -> Pooled:
    """Mean of all items of `values`, of any shape."""
    return Pooled("mean", _sums(values))


def deviation(values: Tensor) -> Pooled:
    """Standard deviation (population) of all items of `values`."""
    return Pooled("deviation", _sums(values, values.double() ** 2))


def variance(values: Tensor) -> Pooled:
    """Variance of all items of `values`, divided by n − 1; nothing to say of fewer than two."""
    return Pooled("variance", _sums(values, values.double() ** 2))


def correlation(first: Tensor, second: Tensor) -> Pooled:
    """Pearson's correlation of two tensors of one shape; nothing to say where either is constant."""
    x, y = first.double(), second.double()
    return Pooled("correlation", _sums(x, y, x * x, y * y, x * y))


def explained_variance(values: Tensor, returns: Tensor) -> Pooled:
    """`1 − Var(returns − values) / Var(returns)`; nothing to say where returns are all equal."""
    errors, targets = returns.double() - values.double(), returns.double()
    return Pooled("explained_variance", _sums(targets, targets**2, errors, errors**2))


def total(values: Tensor) -> Pooled:
    """Sum of all items of `values`."""
    return Pooled("total", values.detach().double().sum()[None])


def rate(amount: float, seconds: float, processes: int) -> Pooled:
    """Amount per second, all processes working at the same time, for `seconds` on average."""
    return Pooled("rate", torch.tensor([amount, seconds / processes], dtype=torch.float64))


class PooledWindow:
    """Figures since the last `means()`; a `Window` of `alignkit.trainers.metrics`.

    Every process has to add figures of the same names.
    """

    def __init__(self) -> None:
        self._figures: dict[str, Pooled] = {}

    def add(self, figures: Mapping[str, Pooled]) -> None:
        """Add figures, by name, to those of the window."""
        for name, figure in figures.items():
            self._figures[name] = self._figures[name].merged(figure) if name in self._figures else figure

    def figures(self) -> dict[str, Pooled]:
        """Return what this process has added since the last `means()`."""
        return dict(self._figures)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the figures over all processes, and start a new window. Those with nothing to say are left out."""
        if not self._figures:
            return {}
        figures = [(name, self._figures[name]) for name in sorted(self._figures)]
        self._figures = {}
        mine = torch.cat([figure.sums.to(accelerator.device) for _, figure in figures])
        pooled = cast(Tensor, accelerator.reduce(mine, reduction="sum")).cpu()
        parts = pooled.split([len(figure.sums) for _, figure in figures])
        read = {name: Pooled(figure.kind, part).read() for (name, figure), part in zip(figures, parts, strict=True)}
        return {name: value for name, value in read.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the open window."""
        return {name: {"kind": figure.kind, "sums": figure.sums} for name, figure in self._figures.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the open window to what `state_dict` returned."""
        self._figures = {name: Pooled(saved["kind"], saved["sums"]) for name, saved in state_dict.items()}


def _sums(first: Tensor, *others: Tensor) -> Tensor:
    """Return count and sums, `(1 + number of tensors,)`."""
    values = [tensor.detach().double().sum() for tensor in (first, *others)]
    return torch.stack([torch.full_like(values[0], first.numel()), *values])


def _mean(sums: list[float]) -> float | None:
    count, value = sums
    return value / count if count else None


def _deviation(sums: list[float]) -> float | None:
    return _variance_of(*sums) ** 0.5 if sums[0] else None


def _variance(sums: list[float]) -> float | None:
    count = sums[0]
    return _variance_of(*sums) * count / (count - 1) if count > 1 else None


def _correlation(sums: list[float]) -> float | None:
    count, x, y, xx, yy, xy = sums
    if not count:
        return None
    product = _variance_of(count, x, xx) * _variance_of(count, y, yy)
    return (xy / count - x * y / count**2) / product**0.5 if product else None


def _explained_variance(sums: list[float]) -> float | None:
    count, target, target_squares, error, error_squares = sums
    spread = _variance_of(count, target, target_squares) if count else 0.0
    return 1 - _variance_of(count, error, error_squares) / spread if spread else None


def _rate(sums: list[float]) -> float | None:
    amount, seconds = sums
    return amount / seconds if seconds else None


def _variance_of(count: float, value: float, squares: float) -> float:
    """Population variance of items from their count, sum and sum of squares. NaN stays NaN."""
    mean_square = squares / count
    found = mean_square - (value / count) ** 2
    return 0.0 if found <= _RELATIVE_VARIANCE_FLOOR * mean_square else found


READERS: dict[str, Callable[[list[float]], float | None]] = {
    "mean": _mean,
    "deviation": _deviation,
    "variance": _variance,
    "correlation": _correlation,
    "explained_variance": _explained_variance,
    "total": lambda sums: sums[0],
    "rate": _rate,
}
