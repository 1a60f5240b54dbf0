"""Win rates written down by hand, both orders among them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from alignkit.errors import DataError, ModelError, TrainingError
from alignkit.evaluation.estimates import accuracy_interval
from alignkit.evaluation.win_rate import preference_interval, win_rate

Texts = Sequence[str]


def better_word(prompts: Sequence[object], first: Texts, second: Texts) -> list[float | None]:
    """Knows "good" from "bad"; has nothing to say about "?"; ties else."""
    return [
        None if "?" in one + other else 0.5 + 0.5 * (("good" in one) - ("good" in other))
        for one, other in zip(first, second, strict=True)
    ]


def always_first(prompts: Sequence[object], first: Texts, second: Texts) -> list[float]:
    return [1.0] * len(prompts)


def test_wins_losses_ties_and_silence() -> None:
    answers = ["good", "good", "bad", "same", "x", "?", "good"]
    baselines = ["bad", "bad one", "good", "same", "y", "z", "bad"]
    found = win_rate(list("abcdefg"), answers, baselines, better_word)
    assert found.preferences == (1.0, 1.0, 0.0, 0.5, 0.5, None, 1.0)
    assert (found.rows, found.ties, found.identical, found.without_verdict) == (6, 2, 1, 1)
    assert found.win_rate == accuracy_interval(4.0, 6)
    assert found.order_consistency == accuracy_interval(5, 5)
    assert found.first_preferred == pytest.approx(0.5)
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_judge_of_places_wins_half_and_is_found_out() -> None:
    found = win_rate(list("abcd"), ["x"] * 4, ["y"] * 4, always_first)
    assert found.win_rate.value == 0.5
    assert found.ties == 4
    assert found.order_consistency is not None
    assert found.order_consistency.value == 0.0
    assert found.first_preferred == 1.0


def test_both_orders_are_asked_and_equal_texts_are_not() -> None:
    asked: list[tuple[str, str]] = []

    def recording(prompts: Sequence[object], first: Texts, second: Texts) -> list[float]:
        asked.extend(zip(first, second, strict=True))
        return [0.5] * len(prompts)

    win_rate(["p", "q"], ["a", "same"], ["b", "same"], recording)
    assert asked == [("a", "b"), ("b", "a")]


def test_verdicts_between_have_a_bootstrap_interval_and_prompts_are_drawn_whole() -> None:
    def unsure(prompts: Sequence[object], first: Texts, second: Texts) -> list[float]:
        return [0.9 if one.startswith("good") else 0.4 for one in first]

    answers, prompts = ["good", "fair"] * 20, list(range(20))
    texts = [str(number // 2) for number in range(40)]
    found = win_rate(texts, answers, ["other"] * 40, unsure, clusters=[number // 2 for number in range(40)])
    assert found.win_rate.value == pytest.approx(((0.9 + 0.6) / 2 + (0.4 + 0.6) / 2) / 2)
    assert found.win_rate.low == pytest.approx(found.win_rate.high)  # all prompts are alike
    alone = win_rate(texts, answers, ["other"] * 40, unsure)
    assert alone.win_rate.low < found.win_rate.low < alone.win_rate.high
    assert len(prompts) * 2 == found.rows


def test_longer_answers_win_less_at_equal_length() -> None:
    def by_length(prompts: Sequence[object], first: Texts, second: Texts) -> list[float]:
        return [float(len(one) > len(other)) for one, other in zip(first, second, strict=True)]

    answers = ["a" * (10 + number % 13) for number in range(60)]
    baselines = ["b" * (8 + number % 11) for number in range(60)]
    found = win_rate([str(number) for number in range(60)], answers, baselines, by_length)
    assert found.win_rate.value > 0.6
    assert abs(found.length_controlled.win_rate.value - 0.5) < abs(found.win_rate.value - 0.5)
    assert found.length_controlled.length > 1


def test_what_cannot_be_judged_is_said() -> None:
    with pytest.raises(DataError, match="nothing to judge"):
        win_rate([], [], [], always_first)
    with pytest.raises(DataError, match="two answers to each"):
        win_rate(["p"], ["a"], ["b", "c"], always_first)
    with pytest.raises(DataError, match="2 clusters"):
        win_rate(["p"], ["a"], ["b"], always_first, clusters=[1, 2])
    with pytest.raises(TrainingError, match="no win rate"):
        win_rate(["p"], ["?"], ["b"], better_word)
    with pytest.raises(ModelError, match="verdict"):
        win_rate(["p"], ["a"], ["b"], lambda prompts, first, second: [float("nan")])


def test_prompts_that_all_agree_leave_room_for_doubt() -> None:
    found = preference_interval([1.0] * 20, [number // 2 for number in range(20)])
    assert found == accuracy_interval(10, 10)
    assert preference_interval([0.3, 0.5], ["same", "same"]).low == 0.0
