"""Accuracy by subset and section, written down by hand."""

from __future__ import annotations

import json

import pytest

from alignkit.errors import DataError
from alignkit.evaluation.estimates import accuracy_interval
from alignkit.evaluation.models import load_policy
from alignkit.evaluation.pairs import compare_preferences, score_preferences
from alignkit.evaluation.reward_bench import SECTIONS, accuracy_by_subset, evaluate_reward_bench
from tests.model_factory import tiny_model
from tests.pair_factory import plain_model
from tests.tiny_preferences import character_tokenizer, text_rows

ROWS = [row for row in text_rows(40, seed=3) if all(text.strip() for text in row.values())][:24]


def test_sections_weigh_their_pairs_and_mathematics_as_much_as_programming() -> None:
    counts = {
        "mt-bench-easy": (3, 4),
        "alpacaeval-easy": (1, 2),
        "math-prm": (1, 2),
        "hep-go": (3, 3),
        "hep-js": (2, 3),
    }
    subsets = [name for name, (_, total) in counts.items() for _ in range(total)]
    chosen = [float(place < right) for right, total in counts.values() for place in range(total)]
    found = accuracy_by_subset(subsets, chosen, [0.5] * len(chosen))
    assert found.subsets["mt-bench-easy"] == accuracy_interval(3, 4)
    assert found.rows == {name: total for name, (_, total) in counts.items()}
    assert found.sections.keys() == {"Chat", "Reasoning"}
    assert found.sections["Chat"].value == pytest.approx(4 / 6)
    assert found.sections["Reasoning"].value == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert found.overall.value == pytest.approx((4 / 6 + 2 / 3) / 2)
    assert found.overall.low < found.overall.value < found.overall.high
    json.dumps(found.as_dict(), allow_nan=False)


def test_unknown_subsets_count_alike_and_ties_as_halves() -> None:
    found = accuracy_by_subset(["x", "x", "y"], [1.0, 0.0, 1.0], [0.0, 0.0, 2.0])
    assert found.sections == {}
    assert found.subsets["x"].value == 0.75
    assert found.overall.value == pytest.approx(0.375)


def test_no_subset_is_in_two_sections() -> None:
    members = [name for names in SECTIONS.values() for name in names]
    assert len(members) == len(set(members)) == 23


def test_rows_are_grouped_by_their_own_subset() -> None:
    model, tokenizer = plain_model("llama"), character_tokenizer()
    policy = load_policy(model, tokenizer)
    rows = [{**row, "subset": "ab"[number % 2]} for number, row in enumerate(ROWS)]
    rows.insert(3, {"prompt": "x", "chosen": " ", "rejected": "y", "subset": "c"})  # a row that cannot be used
    found = evaluate_reward_bench(policy, rows)
    scores = score_preferences(policy, ROWS)
    right = (scores.chosen_rewards > scores.rejected_rewards).tolist()
    assert found.rows == {"a": 12, "b": 12}
    assert found.subsets["a"] == accuracy_interval(sum(right[0::2]), 12)
    with pytest.raises(DataError, match="row 0 has no `subset`"):
        evaluate_reward_bench(policy, ROWS)
    with pytest.raises(DataError, match="one a pair"):
        accuracy_by_subset(["a"], [1.0, 2.0], [0.0, 0.0])


def test_two_models_are_compared_pair_by_pair() -> None:
    tokenizer = character_tokenizer()
    one = score_preferences(plain_model("llama"), ROWS, tokenizer=tokenizer)
    other = score_preferences(
        tiny_model("llama", seed=4), ROWS, tokenizer=tokenizer, reference=tiny_model("llama", seed=9)
    )
    found = compare_preferences(one, other)
    first, second = ((scores.chosen_rewards > scores.rejected_rewards) for scores in (one, other))
    assert found.rows == 24
    assert found.mcnemar.only_first == int((first & ~second).sum())
    assert found.mcnemar.only_second == int((~first & second).sum())
    assert found.accuracy.value == pytest.approx((int(second.sum()) - int(first.sum())) / 24)
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high
