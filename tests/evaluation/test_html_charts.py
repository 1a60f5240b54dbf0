"""Where ticks, lines and whiskers lie."""

from __future__ import annotations

import math

import pytest

from alignkit.evaluation.curves import Panel, Point, Series, panels
from alignkit.evaluation.figures import Figure
from alignkit.evaluation.html_charts import (
    HEIGHT,
    INTERVAL_WIDTH,
    MOST_POINTS,
    WIDTH,
    chart,
    interval_plot,
    nice_ticks,
    tick_labels,
)
from tests.evaluation.run_records import dpo_log, ppo_log


def panel(values: list[float | None], **changes: object) -> Panel:
    series = Series("training", tuple(Point(step, value) for step, value in enumerate(values)))
    return Panel("loss", "Loss", "step", "", (series,))._replace(**changes)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.58, 0.83, ["0.60", "0.65", "0.70", "0.75", "0.80"]),
        (-1.1, 2.4, ["−1.0", "−0.5", "0", "0.5", "1.0", "1.5", "2.0"]),
        (5, 100, ["20", "40", "60", "80", "100"]),
        (0, 5e7, ["0", "1e+07", "2e+07", "3e+07", "4e+07", "5e+07"]),
        (1e-7, 6e-7, ["1e−07", "2e−07", "3e−07", "4e−07", "5e−07", "6e−07"]),
        (1e29, 1e29 * 1.5, None),
        (-1e-300, 1e-300, None),
    ],
)
def test_ticks_are_round_and_told_apart(low: float, high: float, labels: list[str] | None) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 9
    assert len(set(tick_labels(ticks))) == len(ticks)
    if labels is not None:
        assert tick_labels(ticks) == labels


def test_steps_are_whole() -> None:
    assert nice_ticks(1, 2, least=1.0) == [1, 2]


@pytest.mark.parametrize(
    "values",
    [[0.5], [0.5, 0.5], [0.0, 0.0], [1e29, -1e29], [1e-30, 2e-30], [1.0, None, 3.0], [None, 1.0, None], [5e8, 5e8 + 1]],
)
def test_everything_lies_within_the_drawing(values: list[float | None]) -> None:
    drawn = chart(panel(values))
    places = [dot for line in drawn.lines for dot in line.dots]
    assert len(places) == sum(value is not None for value in values)
    for x, y in places:
        assert drawn.left <= x <= drawn.right <= WIDTH
        assert drawn.top <= y <= drawn.bottom <= HEIGHT
    assert all(math.isfinite(tick.place) for tick in [*drawn.x_ticks, *drawn.y_ticks])


def test_a_gap_is_a_gap_and_is_told() -> None:
    drawn = chart(panel([1.0, 2.0, None, 4.0, 5.0]))
    assert drawn.lines[0].path.count("M") == 2
    assert len(drawn.lines[0].lost) == 1
    assert drawn.notes == ["1 value is no number and leaves a gap, marked × below."]
    assert ["2", "no number"] in drawn.table


def test_a_value_between_gaps_is_a_dot_where_there_are_too_many_for_dots() -> None:
    values: list[float | None] = [float(step) for step in range(100)]
    assert chart(panel(values)).lines[0].dots == []
    values[40] = values[42] = None
    assert len(chart(panel(values)).lines[0].dots) == 1


def test_higher_is_up_and_later_is_right() -> None:
    (x0, y0), (x1, y1) = chart(panel([1.0, 3.0])).lines[0].dots
    assert x1 > x0
    assert y1 < y0


def test_a_thinned_curve_says_so() -> None:
    drawn = chart(panel([math.sin(step) for step in range(3000)]))
    assert f"of {3000:,} points" in drawn.notes[0]
    assert drawn.lines[0].path.count("L") < MOST_POINTS
    assert len(drawn.readings) <= MOST_POINTS
    assert len(drawn.table) <= 61


def test_the_stretches_of_the_pointer_cover_the_drawing_once() -> None:
    drawn = chart(next(each for each in panels(dpo_log()) if each.key == "loss"))
    assert len(drawn.readings) == 20
    assert sum(reading.width for reading in drawn.readings) == pytest.approx(drawn.right - drawn.left, abs=1.5)
    both = next(reading for reading in drawn.readings if reading.heading == "step 10")
    assert [text for _, text in both.values] == ["0.640", "0.660"]


def test_the_frontier_has_a_start_and_an_end() -> None:
    drawn = chart(next(each for each in panels(ppo_log()) if each.key == "frontier"))
    assert [(end.label, end.anchor) for end in drawn.ends] == [("start", "start"), ("end", "end")]
    assert len(drawn.lines[0].dots) == 24


def test_the_summary_tells_a_curve_in_words() -> None:
    drawn = chart(panel([0.7, 0.8, 0.6]))
    assert drawn.summary == ("Loss. training: from 0.700 at step 0 to 0.600 at 2, lowest 0.600, highest 0.800.")


def test_intervals_share_a_scale() -> None:
    plot = interval_plot(Figure(0.64, 0.59, 0.70), Figure(0.5, 0.44, 0.56), 0.5)
    assert plot is not None
    (_, before, low, high, _), (_, after, after_low, _, _) = plot.marks
    assert low is not None
    assert high is not None
    assert after_low is not None
    assert 0 < low < before < high < after_low < after < INTERVAL_WIDTH
    assert plot.reference == before


def test_metrics_that_are_compared_share_a_scale() -> None:
    accuracy, shorter = Figure(0.64, 0.59, 0.70), Figure(0.54, 0.48, 0.59)
    plots = [interval_plot(each, None, 0.5, [*accuracy, *shorter]) for each in (accuracy, shorter)]
    first, second = (plot.marks[0] for plot in plots if plot is not None)
    assert second[3] == first[2]  # one ends where the other begins: at 0.59
    assert second[1] < first[1]


def test_no_interval_no_plot() -> None:
    assert interval_plot(Figure(0.63), Figure(0.69), None) is None
    assert interval_plot(Figure(0.63, 0.6, 0.66), Figure(0.69), None) is not None
