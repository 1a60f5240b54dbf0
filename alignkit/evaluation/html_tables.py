"""The report's tables of what was measured, before and after, and the few figures at its top."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from alignkit.evaluation.figures import (
    Figure,
    both_sides,
    figure,
    is_share,
    mapping,
    show_figure,
    show_interval,
    show_number,
)
from alignkit.evaluation.html_charts import IntervalPlot, interval_plot

_MOST_HEADLINES = 4
_MOST_SETTING = 400  # characters of one setting's value

# Words for metrics; another one is called by its name.
_METRICS = {
    "accuracy": "reward accuracy",
    "margin": "reward margin",
    "shorter": "baseline: prefer the shorter",
    "kl": "KL from the reference, nats",
    "tokens": "tokens per answer",
    "eos_rate": "answers that end by themselves",
    "win_rate": "win rate",
    "length_controlled_win_rate": "win rate, length-controlled",
    "calibration_error": "calibration error",
    "distinct_1": "distinct words",
    "distinct_2": "distinct word pairs",
    "finished": "answers that end by themselves",
    "k1": "KL from the reference, nats",
    "k3": "the same by k3",
    "reward_change": "change of the reward, by prompt",
    "overall": "accuracy, all subsets",
    "flip_rate": "verdicts that injected text turned",
}
# Words for evaluations that are named by a word alone.
_EVALUATIONS = {
    "preferences": "Held-out preferences",
    "reward_bench": "Accuracy by subset",
    "win_rate": "Win rate by a judge",
    "injections": "Resistance of the judge to injected text",
    "kl": "KL from the reference",
}
# Values with a meaning of their own, drawn as a line beside the intervals.
_REFERENCES = {
    "accuracy": 0.5,
    "win_rate": 0.5,
    "length_controlled_win_rate": 0.5,
    "shorter": 0.5,
    "margin": 0.0,
    "reward_change": 0.0,
}
# What a run is judged by, the most telling first.
_HEADLINES = (
    "length_controlled_win_rate",
    "win_rate",
    "accuracy",
    "reward",
    "margin",
    "kl",
    "perplexity",
    "eos_rate",
    "tokens",
)
_UNTOLD_METRICS = ("rows", "ties", "is_paired")


class Row(NamedTuple):
    """One metric of an evaluation, before and after."""

    name: str
    label: str
    before: str
    before_interval: str
    after: str
    after_interval: str
    change: str
    plot: IntervalPlot | None


class Evaluation(NamedTuple):
    """One table of the before/after section."""

    name: str
    rows: str
    has_before: bool
    metrics: list[Row]
    details: list[tuple[str, str]]


class Headline(NamedTuple):
    """One of the few figures at the top."""

    row: Row
    evaluation: str
    rows: str


def evaluation_table(entry: Mapping[str, Any]) -> Evaluation:
    """Turn an evaluation of a record into a table; metrics that are no figures are left out."""
    metrics, baseline = both_sides(entry)
    found = {name: each for name, value in metrics.items() if (each := figure(value)) is not None}
    found = {name: each for name, each in found.items() if name not in _UNTOLD_METRICS}
    # A baseline of the data, not of the model, is the same before.
    before = {name: figure(baseline.get(name)) for name in found if name != "shorter"}
    ends: dict[str, list[float]] = {}  # of the intervals that are drawn on one scale
    for name, each in [*found.items(), *before.items()]:
        if each is not None:
            ends.setdefault(_scale(name), []).extend(end for end in each if end is not None)
    rows = [_row(name, each, before.get(name), ends[_scale(name)]) for name, each in found.items()]
    return Evaluation(
        name=_title(str(entry["name"])),
        rows=show_number(entry["rows"]),
        has_before=any(row.before for row in rows),
        metrics=rows,
        details=list(flat(mapping(entry.get("details")))),
    )


def _title(name: str) -> str:
    return _EVALUATIONS.get(name, name[:1].upper() + name[1:].replace("_", " "))


def _scale(name: str) -> str:
    """A name for the scale that a metric is drawn on: metrics that are to be compared share theirs."""
    if name.startswith(("subset/", "section/")) or name == "overall":
        return "subsets"
    return {"shorter": "accuracy", "length_controlled_win_rate": "win_rate"}.get(name, name)


def _row(name: str, after: Figure, before: Figure | None, ends: list[float]) -> Row:
    share = is_share(name)
    change = "" if before is None else _change(before, after, share=share)
    return Row(
        name=name,
        label=_label(name),
        before="" if before is None else show_figure(before.value, share=share),
        before_interval="" if before is None else show_interval(before, share=share),
        after=show_figure(after.value, share=share),
        after_interval=show_interval(after, share=share),
        change=change,
        plot=interval_plot(after, before, _REFERENCES.get(name), ends),
    )


def _label(name: str) -> str:
    """Words for a metric; of a subset or a section, its name."""
    kind, slash, rest = name.partition("/")
    if slash and kind in ("subset", "section"):
        return f"{kind} {rest}"
    words = _METRICS.get(kind, kind.replace("_", " "))
    return f"{words}: {rest.replace('_', ' ')}" if slash else words


def _change(before: Figure, after: Figure, *, share: bool) -> str:
    difference = after.value - before.value
    if not difference:
        return "0"
    size = f"{100 * abs(difference):.1f} pt" if share else show_number(abs(difference))
    return ("+" if difference > 0 else "−") + size


def headlines_of(evaluations: list[Evaluation]) -> list[Headline]:
    """The most telling metrics, each from the first evaluation that has it."""
    found = []
    for name in _HEADLINES:
        for evaluation in evaluations:
            row = next((row for row in evaluation.metrics if row.name == name), None)
            if row is not None:
                found.append(Headline(row, evaluation.name, evaluation.rows))
                break
    return found[:_MOST_HEADLINES]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested mappings, a line each."""
    for name, value in values.items():
        label = f"{prefix}{str(name).replace('_', ' ')}"
        found = figure(value)
        if isinstance(value, Mapping) and found is None:
            yield from flat(value, f"{label}: ")
        elif isinstance(value, Mapping) and found is not None:
            share = is_share(str(name))
            yield label, f"{show_figure(found.value, share=share)} {show_interval(found, share=share)}".strip()
        elif found is not None:
            yield label, show_number(value)
        else:
            yield label, setting(value)


def setting(value: Any) -> str:
    """Write the value of an option on one line, cut where it is very long."""
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        text = ", ".join(map(str, value)) or "none"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MOST_SETTING else f"{text[:_MOST_SETTING]}… ({len(text):,} characters)"
