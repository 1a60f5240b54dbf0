"""The preference set that ships with alignkit: complete, varied, and without a shortcut to its labels."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import alignkit.data

PATH = Path(alignkit.data.__file__).parent / "demo" / "preferences.jsonl"
FOLDS = 5


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def bag_of_words(pairs: list[dict[str, str]]) -> np.ndarray:
    """Word counts of chosen minus those of rejected, `(pairs, words)`, for words that occur in five texts or more."""
    texts = [[Counter(words(pair[side])) for side in ("chosen", "rejected")] for pair in pairs]
    frequency = Counter(word for pair in texts for counts in pair for word in counts)
    column = {word: i for i, word in enumerate(sorted(word for word, n in frequency.items() if n >= 5))}
    features = np.zeros((len(pairs), len(column)))
    for row, (chosen, rejected) in enumerate(texts):
        for sign, counts in ((1, chosen), (-1, rejected)):
            for word, count in counts.items():
                if word in column:
                    features[row, column[word]] += sign * count
    return features


def lengths(pairs: list[dict[str, str]]) -> np.ndarray:
    """Differences of length in words, characters and their logarithms, `(pairs, 4)`."""
    measures = [[len(words(pair[s])) for s in ("chosen", "rejected")] for pair in pairs]
    characters = [[len(pair[s]) for s in ("chosen", "rejected")] for pair in pairs]
    raw = np.array([[a - b, c - d] for (a, b), (c, d) in zip(measures, characters, strict=True)], dtype=float)
    logs = np.array([[np.log(a / b), np.log(c / d)] for (a, b), (c, d) in zip(measures, characters, strict=True)])
    features = np.concatenate([raw, logs], axis=1)
    return features / features.std(axis=0)


def accuracy(differences: np.ndarray, penalty: float) -> float:
    """Cross-validated share of pairs whose chosen side a logistic regression on `differences` tells from the other.

    A pair and its mirror image carry the same information, so the model has no intercept and every pair is positive.
    """
    order = np.random.default_rng(0).permutation(len(differences))
    right = 0
    for fold in range(FOLDS):
        test = order[fold::FOLDS]
        train = np.setdiff1d(order, test)
        weights = fit(differences[train], penalty)
        right += int((differences[test] @ weights > 0).sum())
    return right / len(differences)


def fit(x: np.ndarray, penalty: float) -> np.ndarray:
    """Minimise `mean log(1 + exp(−x w)) + penalty/2 · |w|²` by gradient descent with a safe step."""
    weights = np.zeros(x.shape[1])
    step = 1 / (0.25 * np.linalg.norm(x, 2) ** 2 / len(x) + penalty)
    for _ in range(500):
        slope = -x.T @ (1 / (1 + np.exp(x @ weights))) / len(x) + penalty * weights
        weights -= step * slope
    return weights


def test_complete_and_split(pairs):
    assert len(pairs) >= 300
    assert {pair["category"] for pair in pairs} == {"helpful", "harmless", "honest", "concise"}
    assert min(Counter(pair["category"] for pair in pairs).values()) >= 60
    assert {pair["split"] for pair in pairs} == {"train", "test"}
    for pair in pairs:
        assert all(pair[key].strip() == pair[key] and pair[key] for key in ("prompt", "chosen", "rejected"))
        assert pair["chosen"] != pair["rejected"]
    for key in ("id", "prompt", "chosen", "rejected"):
        assert len({pair[key] for pair in pairs}) == len(pairs)


def test_the_classifier_finds_a_planted_shortcut(pairs):
    planted = [{**pair, "chosen": pair["chosen"] + " certainly"} for pair in pairs]
    assert accuracy(bag_of_words(planted), penalty=0.01) > 0.9
    longer = [{**pair, "chosen": pair["chosen"] + " and so on" * 40} for pair in pairs]
    assert accuracy(lengths(longer), penalty=0.01) > 0.9


@pytest.mark.parametrize("penalty", [0.001, 0.01, 0.1])
def test_words_do_not_give_the_label_away(pairs, penalty):
    assert accuracy(bag_of_words(pairs), penalty) < 0.6


@pytest.mark.parametrize("penalty", [0.001, 0.01, 0.1])
def test_lengths_do_not_give_the_label_away(pairs, penalty):
    assert accuracy(lengths(pairs), penalty) < 0.6


def test_neighbours_are_not_copies(pairs, record_property):
    """No templates: the nearest neighbour of every prompt shares at most half of its words (Jaccard similarity)."""
    sets = [set(words(pair["prompt"])) for pair in pairs]
    nearest = [max(len(a & b) / len(a | b) for j, b in enumerate(sets) if j != i) for i, a in enumerate(sets)]
    record_property("mean_nearest_neighbour_similarity", float(np.mean(nearest)))
    record_property("largest_nearest_neighbour_similarity", max(nearest))
    assert max(nearest) <= 0.5
