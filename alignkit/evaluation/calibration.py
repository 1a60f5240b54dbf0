"""Whether a model is right as often as it says: expected calibration error and reliability bins."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from alignkit.evaluation.estimates import Estimate, accuracy_interval, as_floats
from alignkit.functional.statistics import calibration_error
from alignkit.trainers.reward_metrics import CALIBRATION_BINS


class ReliabilityBin(NamedTuple):
    """Pairs about which the model is about equally sure.

    Attributes:
        low, high: the chances that fall into the bin.
        rows: pairs in it.
        confidence: mean stated chance.
        accuracy: share of them that the model gets right, ties as half.
    """

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: Estimate


class Calibration(NamedTuple):
    """Stated chances against what came.

    Attributes:
        error: expected calibration error, Eq. 3 of arXiv 1706.04599. It is never negative: on few rows even a
            perfectly calibrated model has one well above 0.
        bins: those that hold a pair.
    """

    error: float
    bins: tuple[ReliabilityBin, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        bins = [{**part._asdict(), "accuracy": part.accuracy._asdict()} for part in self.bins]
        return {"error": self.error, "bins": bins}


def calibrate(margins: ArrayLike, *, bins: int = CALIBRATION_BINS) -> Calibration:
    """Compare the chance `σ(|margin|)` that a model gives the completion it prefers with how often it is right.

    Args:
        margins: reward of the chosen minus that of the rejected completion, `(N,)`, in the units of Bradley-Terry
            (the log-odds of the preference).
        bins: of equal width over [0, 1]; the upper half is used, since nobody prefers with a chance below one half.
    """
    differences = as_floats(margins)
    confidence = torch.sigmoid(torch.from_numpy(np.abs(differences)))
    right = torch.from_numpy((differences > 0) + 0.5 * (differences == 0))
    places = (confidence * bins).long().clamp(max=bins - 1)
    found = []
    for place in places.unique().tolist():
        mine = places == place
        rows, correct = int(mine.sum()), float(right[mine].sum())
        mean = float(confidence[mine].mean())
        found.append(ReliabilityBin(place / bins, (place + 1) / bins, rows, mean, accuracy_interval(correct, rows)))
    return Calibration(calibration_error(confidence, right, bins).item(), tuple(found))
