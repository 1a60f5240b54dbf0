"""The geometry of the report's pictures: where lines, ticks and marks lie in an SVG that the template writes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from alignkit.evaluation.curves import Panel, Series, thinned
from alignkit.evaluation.figures import Figure, show_number

# In units of the drawing. It is shown about as wide as this on a phone, where text must stay readable.
WIDTH, HEIGHT = 320, 216
_TOP, _RIGHT, _BOTTOM = 24, 10, 40
_CHARACTER = 7.0  # width of a digit
MOST_POINTS = 180
_MOST_DOTS = 24  # curves of more points are drawn without dots
_TICKS = 5
_TABLE_ROWS = 60
INTERVAL_WIDTH, INTERVAL_HEIGHT = 180, 30


class Tick(NamedTuple):
    """A mark on an axis."""

    place: float
    label: str


class Line(NamedTuple):
    """A curve: an SVG path with gaps where values are no numbers, and dots."""

    label: str
    tone: int
    is_held_out: bool
    path: str
    dots: list[tuple[float, float]]
    lost: list[float]  # places of the values that are no numbers


class Reading(NamedTuple):
    """What is shown where the pointer is: the stretch that it covers, the guide, and values as (tone, text)."""

    left: float
    width: float
    place: float
    heading: str
    values: list[tuple[int, str]]
    dots: list[tuple[int, float, float]]


class End(NamedTuple):
    """A named end of a path."""

    x: float
    y: float
    label: str
    shift: float
    anchor: str


class Chart(NamedTuple):
    """A panel, ready to be drawn."""

    key: str
    title: str
    x_label: str
    y_label: str
    summary: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    left: float
    reference: float | None
    reference_label: str
    readings: list[Reading]
    notes: list[str]
    table: list[list[str]]
    ends: list[End]
    is_path: bool
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


class _Scale(NamedTuple):
    """Maps values between `low` and `high` to places between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def chart(panel: Panel) -> Chart:
    """Lay out a panel; curves of many points are thinned, and a note says so."""
    series = [thinned(curve, MOST_POINTS) for curve in panel.series]
    xs = [x for curve in series for x, _ in curve.points]
    ys = [y for curve in series for _, y in curve.drawn]
    y_low, y_high = _range(ys, panel)
    y_ticks = nice_ticks(y_low, y_high)
    y_texts = tick_labels(y_ticks, share=panel.is_share)
    left = 8 + _CHARACTER * max(map(len, y_texts))
    x_low, x_high = _padded(min(xs), max(xs)) if panel.is_path else _spread(min(xs), max(xs))
    across, up = _Scale(x_low, x_high, left, WIDTH - _RIGHT), _Scale(y_low, y_high, HEIGHT - _BOTTOM, _TOP)
    x_ticks = nice_ticks(x_low, x_high, least=0.0 if panel.is_path else 1.0)
    reference = None if panel.reference is None or not y_low <= panel.reference <= y_high else up(panel.reference)
    return Chart(
        key=panel.key,
        title=panel.title,
        x_label=panel.x_label,
        y_label=panel.y_label,
        summary=_summary(panel),
        lines=[_line(curve, across, up, MOST_POINTS if panel.is_path else _MOST_DOTS) for curve in series],
        x_ticks=[Tick(across(x), text) for x, text in zip(x_ticks, tick_labels(x_ticks), strict=True)],
        y_ticks=[Tick(up(y), text) for y, text in zip(y_ticks, y_texts, strict=True)],
        left=left,
        reference=reference,
        reference_label=panel.reference_label,
        readings=_path_readings(panel, series[0], across, up)
        if panel.is_path
        else _readings(panel, series, across, up),
        notes=_notes(panel, series),
        table=_table(panel),
        ends=_ends(series[0], across, up) if panel.is_path else [],
        is_path=panel.is_path,
    )


def nice_ticks(low: float, high: float, *, least: float = 0.0) -> list[float]:
    """Return round numbers between `low` and `high`, about five of them and no nearer to one another than `least`."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(least, power * min((1, 2, 2.5, 5, 10), key=lambda each: abs(math.log(each * power / rough))))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float], *, share: bool = False) -> list[str]:
    """Write ticks with as many decimals as tell them apart."""
    scale, unit = (100, " %") if share else (1, "")
    values = [scale * tick for tick in ticks]
    largest = max((abs(value) for value in values), default=0.0)
    step = abs(values[1] - values[0]) if len(values) > 1 else largest or 1.0
    if largest >= 1e6 or (largest and largest < 1e-3):
        texts = [f"{value:.2g}" if value else "0" for value in values]
    else:
        decimals = next((count for count in range(7) if abs(step * 10**count - round(step * 10**count)) < 1e-6), 7)
        texts = [f"{value:,.{decimals}f}" for value in values]
    return [("0" if float(text.replace(",", "")) == 0 else text).replace("-", "−") + unit for text in texts]


class IntervalPlot(NamedTuple):
    """Dots and whiskers of a metric: (kind, dot, low, high, height) each, on one scale."""

    marks: list[tuple[str, float, float | None, float | None, float]]
    reference: float | None


def interval_plot(
    after: Figure, before: Figure | None, reference: float | None, others: Iterable[float] = ()
) -> IntervalPlot | None:
    """Lay out one metric before and after on a common scale, which covers `others` too; `None` without an interval."""
    figures = [("before", before), ("after", after)] if before is not None else [("after", after)]
    given = [(kind, found) for kind, found in figures if found is not None]
    ends = [end for _, found in given for end in (found.value, found.low, found.high) if end is not None]
    if all(found.low is None for _, found in given):
        return None
    ends += [*others, *([] if reference is None else [reference])]
    across = _Scale(*_padded(min(ends), max(ends)), 4, INTERVAL_WIDTH - 4)
    heights = [9.0, 21.0] if len(given) == 2 else [15.0]
    marks = [
        (
            kind,
            across(found.value),
            None if found.low is None else across(found.low),
            None if found.high is None else across(found.high),
            height,
        )
        for (kind, found), height in zip(given, heights, strict=True)
    ]
    return IntervalPlot(marks, None if reference is None else across(reference))


def _range(values: Sequence[float], panel: Panel) -> tuple[float, float]:
    low, high = min(values), max(values)
    if panel.reference is not None and min(abs(low - panel.reference), abs(high - panel.reference)) <= high - low:
        low, high = min(low, panel.reference), max(high, panel.reference)
    low, high = _padded(low, high)
    return (max(low, 0.0), min(high, 1.0)) if panel.is_share and min(values) >= 0 and max(values) <= 1 else (low, high)


def _padded(low: float, high: float) -> tuple[float, float]:
    low, high = _spread(low, high)
    room = 0.06 * (high - low)
    return low - room, high + room


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range that is wide enough to be divided by its width."""
    least = max(abs(low), abs(high)) * 1e-6 or 1.0
    return (
        (low, high) if high - low >= least else (low - max(least, 0.5 * abs(low)), high + max(least, 0.5 * abs(high)))
    )


def _line(curve: Series, across: _Scale, up: _Scale, most_dots: int) -> Line:
    commands, pen = [], "M"
    for x, y in curve.points:
        if y is None:
            pen = "M"
            continue
        commands.append(f"{pen}{across(x):g} {up(y):g}")
        pen = "L"
    dots = [(across(x), up(y)) for x, y in curve.drawn]
    lost = [across(x) for x, y in curve.points if y is None]
    ys = [None, *(y for _, y in curve.points), None]
    alone = [  # no line leads to them
        (across(x), up(y))
        for index, (x, y) in enumerate(curve.points, start=1)
        if y is not None and ys[index - 1] is None and ys[index + 1] is None
    ]
    shown = dots if len(dots) <= most_dots else alone
    return Line(curve.label, curve.tone, curve.is_held_out, " ".join(commands), shown, lost)


def _readings(panel: Panel, series: Sequence[Series], across: _Scale, up: _Scale) -> list[Reading]:
    """One stretch for each x, which reaches half of the way to its neighbours."""
    at: dict[float, list[tuple[int, float | None]]] = {}
    for curve in series:
        for x, y in curve.points:
            at.setdefault(x, []).append((curve.tone, y))
    readings = []
    for x, (left, right) in _stretches(sorted(at), across):
        texts = [(tone, _value(y, panel)) for tone, y in at[x]]
        dots = [(tone, across(x), up(y)) for tone, y in at[x] if y is not None]
        readings.append(
            Reading(left, right - left, across(x), f"{panel.x_label} {show_number(_whole(x))}", texts, dots)
        )
    return readings


def _stretches(xs: Sequence[float], across: _Scale) -> Iterable[tuple[float, tuple[float, float]]]:
    places = [across(x) for x in xs]
    between = [round((first + second) / 2, 1) for first, second in itertools.pairwise(places)]
    return zip(xs, zip([across.start, *between], [*between, across.end], strict=True), strict=True)


def _path_readings(panel: Panel, curve: Series, across: _Scale, up: _Scale) -> list[Reading]:
    return [
        Reading(
            across(x) - 5,
            10,
            across(x),
            f"{index} of {len(curve.drawn)}",
            [(curve.tone, f"KL {show_number(x)}, reward {show_number(y)}")],
            [(curve.tone, across(x), up(y))],
        )
        for index, (x, y) in enumerate(curve.drawn, start=1)
    ]


def _ends(curve: Series, across: _Scale, up: _Scale) -> list[End]:
    ends = []
    for label, (x, y) in (("start", curve.drawn[0]), ("end", curve.drawn[-1])):
        place = across(x)
        is_right = place > (across.start + across.end) / 2
        ends.append(End(place, up(y), label, 4 if is_right else -4, "end" if is_right else "start"))
    return ends


def _value(value: float | None, panel: Panel) -> str:
    if value is None:
        return "no number"
    return f"{100 * value:.1f} %" if panel.is_share else show_number(value)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _summary(panel: Panel) -> str:
    """The chart in words, for those who cannot see it."""
    parts = []
    for curve in panel.series:
        (x, first), (end, last) = curve.drawn[0], curve.drawn[-1]
        values = [y for _, y in curve.drawn]
        parts.append(
            f"{curve.label}: from {_value(first, panel)} at {panel.x_label} {show_number(_whole(x))} to "
            f"{_value(last, panel)} at {show_number(_whole(end))}, lowest {_value(min(values), panel)}, highest "
            f"{_value(max(values), panel)}"
        )
    return f"{panel.title}. {'; '.join(parts)}."


def _notes(panel: Panel, series: Sequence[Series]) -> list[str]:
    notes = []
    lost = sum(curve.not_numbers for curve in panel.series)
    if lost:
        values = "value is no number and leaves a gap" if lost == 1 else "values are no numbers and leave gaps"
        notes.append(f"{lost} {values}, marked × below.")
    for whole, curve in zip(panel.series, series, strict=True):
        if len(curve.points) < len(whole.points):
            notes.append(
                f"{whole.label}: drawn are {len(curve.points):,} of {len(whole.points):,} points, the lowest and "
                "highest of each stretch among them."
            )
    return notes


def _table(panel: Panel) -> list[list[str]]:
    """The numbers of a chart, evenly thinned to some dozens of rows; the first row holds the headings."""
    at: dict[float, dict[int, str]] = {}
    if panel.is_path:
        rows = [[str(index), show_number(x), _value(y, panel)] for index, (x, y) in enumerate(panel.series[0].drawn, 1)]
        return [["rollout", panel.x_label, panel.y_label], *_evenly(rows)]
    for column, curve in enumerate(panel.series):
        for x, y in curve.points:
            at.setdefault(x, {})[column] = _value(y, panel)
    rows = [
        [show_number(_whole(x)), *(at[x].get(column, "") for column in range(len(panel.series)))] for x in sorted(at)
    ]
    return [[panel.x_label, *(curve.label for curve in panel.series)], *_evenly(rows)]


def _evenly(rows: list[list[str]]) -> list[list[str]]:
    if len(rows) <= _TABLE_ROWS:
        return rows
    return [rows[round(index * (len(rows) - 1) / (_TABLE_ROWS - 1))] for index in range(_TABLE_ROWS)]
