"""How often the chosen completion has the higher reward, as a metric of `evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from alignkit.evaluation.estimates import accuracy_interval, as_floats, mean_interval, wins

_DESCRIPTION = (
    "Share of preference pairs whose chosen completion has the higher reward, ties as halves, and the margin."
)
_INPUTS = """
Args:
    predictions: rewards of the chosen completions.
    references: rewards of the rejected ones.
Returns:
    accuracy, accuracy_low, accuracy_high (Wilson's 95 % interval), margin, margin_low, margin_high (bootstrap), ties.
"""
_CITATION = "Wilson, E. B. (1927). Probable inference, the law of succession, and statistical inference. JASA 22."


class PreferenceAccuracy(evaluate.Metric):
    """Accuracy and margin of rewards."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        margins = as_floats(predictions) - as_floats(references)
        accuracy, margin = accuracy_interval(wins(margins), len(margins)), mean_interval(margins)
        return {
            "accuracy": accuracy.value,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "margin": margin.value,
            "margin_low": margin.low,
            "margin_high": margin.high,
            "ties": int((margins == 0).sum()),
        }
