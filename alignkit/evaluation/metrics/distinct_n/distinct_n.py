"""Distinct-1 and distinct-2 of texts, as a metric of `evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from alignkit.evaluation.diversity import distinct_n

_DESCRIPTION = "Different words and pairs of words, as a share of all of them."
_INPUTS = """
Args:
    predictions: texts.
    n: the longest n-grams; 2 by default.
Returns:
    distinct_1, ..., distinct_n.
"""
_CITATION = "Li, J. et al. (2016). A Diversity-Promoting Objective Function for Neural Conversation Models. NAACL."


class DistinctN(evaluate.Metric):
    """Distinct n-grams."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: Any, n: int = 2) -> dict[str, float]:
        return {f"distinct_{order}": distinct_n(predictions, order) for order in range(1, n + 1)}
