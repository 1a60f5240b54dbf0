"""Win rate, and win rate at equal length, as a metric of `evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from alignkit.evaluation.length_control import length_controlled_win_rate
from alignkit.evaluation.win_rate import preference_interval

_DESCRIPTION = "Mean preference of a judge for a model over a baseline, raw and controlled for the answers' lengths."
_INPUTS = """
Args:
    predictions: preference for the model's answer over the baseline's, from 0 to 1; 0.5 is a tie.
    references: length of the model's answer minus that of the baseline's, in any unit.
Returns:
    win_rate, length_controlled_win_rate, each with _low and _high (95 %), and length_effect (log-odds).
"""
_CITATION = "Dubois, Y. et al. (2024). Length-Controlled AlpacaEval. arXiv 2404.04475."


class WinRate(evaluate.Metric):
    """Win rates, raw and at equal length."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        controlled = length_controlled_win_rate(predictions, references)
        found = {
            "win_rate": preference_interval(predictions, range(len(predictions))),
            "length_controlled_win_rate": controlled.win_rate,
        }
        values = {name: estimate.value for name, estimate in found.items()}
        lows = {f"{name}_low": estimate.low for name, estimate in found.items()}
        highs = {f"{name}_high": estimate.high for name, estimate in found.items()}
        return {**values, **lows, **highs, "length_effect": controlled.length}
