"""Which curves a log holds, and how long ones are thinned."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from alignkit.evaluation.curves import Panel, Point, Series, panels, thinned
from tests.evaluation.run_records import dpo_log, ppo_log


def by_key(log: list[dict[str, Any]]) -> dict[str, Panel]:
    return {panel.key: panel for panel in panels(log)}


def labels(panel: Panel) -> list[str]:
    return [series.label for series in panel.series]


def test_a_dpo_log_fills_its_panels_and_no_others() -> None:
    found = by_key(dpo_log())
    assert [key for key, panel in found.items() if panel.is_main] == [
        "loss",
        "accuracy",
        "margin",
        "rewards",
        "logps",
        "grad_norm",
    ]
    assert [key for key, panel in found.items() if not panel.is_main] == ["learning_rate"]
    assert labels(found["loss"]) == ["training", "held out"]
    assert found["loss"].series[1].points == (Point(10, 0.66), Point(20, 0.66))
    assert labels(found["rewards"]) == ["chosen", "rejected"]
    assert found["accuracy"].x_label == "step"


def test_a_ppo_log_has_the_frontier_beside_its_kl_and_counts_episodes() -> None:
    found = by_key(ppo_log())
    assert [key for key, panel in found.items() if panel.is_main] == ["reward", "kl", "frontier", "length", "endings"]
    assert found["kl"].x_label == "episode"
    assert found["kl"].series[0].points[0] == (16, pytest.approx(0.25))
    assert found["frontier"].series[0].points[-1] == (pytest.approx(6), pytest.approx(2))
    assert "rewards/<b>polite</b>" in found  # a metric without a place of its own
    assert not found["loss"].is_main


def test_a_reward_model_names_its_metrics_without_a_slash() -> None:
    entries = [
        {"step": step, "accuracy": 0.6, "margin": 0.1, "mean_reward": 0.0, "min_reward": -1.0} for step in (1, 2)
    ]
    held_out = {"step": 2, "eval_accuracy": 0.7, "eval_accuracy_low": 0.6, "eval_calibration_error": 0.05}
    found = by_key([*entries, held_out])
    assert labels(found["accuracy"]) == ["training", "held out"]
    assert labels(found["reward_range"]) == ["mean", "lowest"]
    assert labels(found["calibration"]) == ["held out"]
    assert set(found) == {"accuracy", "margin", "reward_range", "calibration"}  # ends of intervals are no curves


def test_several_evaluation_sets_are_several_curves() -> None:
    log: list[dict[str, Any]] = [
        {"step": 1, "loss": 0.7},
        {"step": 2, "eval_hh_loss": 0.6, "eval_hh_runtime": 1.0, "eval_hh_mean_token_accuracy": 0.3},
        {"step": 2, "eval_code_loss": 0.5, "eval_code_runtime": 1.0},
    ]
    found = by_key(log)
    assert sorted(labels(found["loss"])) == ["held out (code)", "held out (hh)", "training"]
    assert len({series.tone for series in found["loss"].series}) == 3
    assert labels(found["mean_token_accuracy"]) == ["held out (hh)"]  # not the accuracy of a set "mean_token"


def test_what_is_no_number_is_a_gap() -> None:
    values: list[Any] = [0.7, math.nan, None, math.inf, "0.6", True, 1e300, 0.5]
    log = [{"step": step, "loss": value} for step, value in enumerate(values)]
    (panel,) = panels(log)
    assert [y for _, y in panel.series[0].points] == [0.7, None, None, None, None, None, None, 0.5]
    assert panel.series[0].not_numbers == 6


@pytest.mark.parametrize("log", [[], [{}], [{"step": 1}], [{"step": 1, "loss": None}], [{"step": 1, "loss": math.nan}]])
def test_no_numbers_no_panels(log: list[dict[str, Any]]) -> None:
    assert panels(log) == []


def test_without_steps_the_place_in_the_log_counts() -> None:
    (panel,) = panels([{"loss": 0.7}, {"loss": 0.6, "step": None}])
    assert panel.series[0].points == (Point(0, 0.7), Point(1, 0.6))
    assert panel.x_label == "entry of the log"


def test_thinning_keeps_the_ends_the_spikes_and_the_gaps() -> None:
    points = [Point(step, 1.0 + 0.001 * (step % 7)) for step in range(5000)]
    points[1234], points[3000], points[4321] = Point(1234, 90.0), Point(3000, -5.0), Point(4321, None)
    series = Series("loss", tuple(points))
    small = thinned(series, 180)
    assert 80 < len(small.points) <= 180
    assert {points[0], points[1234], points[3000], points[4321], points[-1]} <= set(small.points)
    assert list(small.points) == sorted(small.points, key=lambda point: point.x)
    assert set(small.points) <= set(points)  # nothing is averaged


def test_thinning_connects_nothing_across_a_gap() -> None:
    points = tuple(Point(step, 1.0 if step % 5 == 0 else None) for step in range(700))
    small = thinned(Series("reward", points), 180)
    assert len(small.points) <= 180
    values = [y for _, y in small.points]
    assert not any(first is not None and second is not None for first, second in itertools.pairwise(values))


def test_without_gaps_the_points_are_used_up() -> None:
    series = Series("loss", tuple(Point(step, math.sin(step)) for step in range(5000)))
    assert 170 < len(thinned(series, 180).points) <= 180


def test_a_short_curve_is_not_thinned() -> None:
    series = Series("loss", tuple(Point(step, 1.0) for step in range(180)))
    assert thinned(series, 180) is series
