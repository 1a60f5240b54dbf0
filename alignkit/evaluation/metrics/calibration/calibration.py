"""Expected calibration error of reward margins, as a metric of `evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from alignkit.evaluation.calibration import calibrate
from alignkit.evaluation.estimates import as_floats

_DESCRIPTION = "Expected calibration error of the chance that Bradley-Terry's model gives the completion it prefers."
_INPUTS = """
Args:
    predictions: rewards of the chosen completions.
    references: rewards of the rejected ones.
Returns:
    calibration_error, and bins: a list of low, high, rows, confidence, accuracy.
"""
_CITATION = "Guo, C. et al. (2017). On Calibration of Modern Neural Networks. arXiv 1706.04599."


class CalibrationError(evaluate.Metric):
    """Calibration of rewards."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        found = calibrate(as_floats(predictions) - as_floats(references)).as_dict()
        return {"calibration_error": found["error"], "bins": found["bins"]}
