"""What the report shows of a run record, section by section, as plain values that the template writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from alignkit.evaluation.figures import (
    MISSING,
    Figure,
    figure,
    is_share,
    mapping,
    number,
    show_bytes,
    show_figure,
    show_interval,
    show_number,
    show_seconds,
)
from alignkit.evaluation.html_charts import IntervalPlot, interval_plot
from alignkit.evaluation.html_text import FOLDED_CHARACTERS, Compared, compare, shortened
from alignkit.hub.record import RunRecord

SAFETY = "safety"  # names of evaluations that belong into the safety table begin with it
_MOST_SAMPLES = 24
_MOST_HEADLINES = 4
_PROMPT_END = 220  # characters of a long prompt that are shown unfolded: its last ones, where the question is
_MOST_SETTING = 400  # characters of one setting's value

_METHODS = {"dpo": "DPO", "kto": "KTO", "ppo": "PPO", "reward": "Reward model"}
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
}
# Values with a meaning of their own, drawn as a line beside the intervals.
_REFERENCES = {"accuracy": 0.5, "win_rate": 0.5, "length_controlled_win_rate": 0.5, "shorter": 0.5, "margin": 0.0}
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


class Sample(NamedTuple):
    """One prompt and its answers."""

    prompt: str
    prompt_end: str
    prompt_length: int
    before: str | None
    compared: Compared
    is_long: bool
    left_out: list[str]
    rewards: tuple[str, str] | None


class Dataset(NamedTuple):
    """One dataset, in words and numbers."""

    name: str
    facts: list[tuple[str, str]]
    drops: list[tuple[str, str, str]]
    lengths: list[list[str]]
    sha256: str


class View(NamedTuple):
    """Everything but the curves."""

    title: str
    ended: str
    sentence: str
    facts: list[tuple[str, str]]
    headlines: list[Headline]
    evaluations: list[Evaluation]
    safety: list[Evaluation]
    samples: list[Sample]
    samples_left: int
    data: list[Dataset]
    audit: list[tuple[str, str]]
    changed: list[tuple[str, str]]
    defaults: list[tuple[str, str]]
    usage: list[tuple[str, str]]
    hardware: list[tuple[str, str]]
    versions: list[tuple[str, str]]
    model: list[tuple[str, str]]


def view(record: RunRecord) -> View:
    """Turn a record into what the page shows."""
    evaluations = [_evaluation(each) for each in record.evaluations]
    headlines = _headlines(evaluations)
    is_safety = [str(each["name"]).lower().startswith(SAFETY) for each in record.evaluations]
    return View(
        title=f"{_METHODS.get(record.method, record.method)} on {_base(record)}",
        ended=_time(record.finished),
        sentence=_sentence(record, headlines),
        facts=_facts(record),
        headlines=headlines,
        evaluations=[each for each, safe in zip(evaluations, is_safety, strict=True) if not safe],
        safety=[each for each, safe in zip(evaluations, is_safety, strict=True) if safe],
        samples=[_sample(each) for each in record.samples[:_MOST_SAMPLES]],
        samples_left=max(0, len(record.samples) - _MOST_SAMPLES),
        data=[_dataset(each) for each in record.data],
        audit=list(_flat(record.audit or {})),
        changed=[(name, _setting(record.settings[name])) for name in record.changed if name in record.settings],
        defaults=[(name, _setting(value)) for name, value in record.settings.items() if name not in record.changed],
        usage=_usage(record),
        hardware=_hardware(record),
        versions=[(name, str(value)) for name, value in {"alignkit": record.alignkit, **record.versions}.items()],
        model=_model(record),
    )


def _base(record: RunRecord) -> str:
    return str(record.base.get("name") or "a model")


def _sentence(record: RunRecord, headlines: list[Headline]) -> str:
    """What the run is, and what it achieved first of all."""
    adapter = record.adapter
    if adapter is None:
        trained = f"all weights of {_base(record)}"
    else:
        kind, rank = str(adapter.get("kind") or "PEFT").replace("LORA", "LoRA"), number(adapter.get("r"))
        trained = f"a {kind} adapter" + (f" of rank {rank:g}" if rank is not None else "") + f" on {_base(record)}"
    training = next((each for each in record.data if each["name"] == "train"), None)
    rows = None if training is None else number(training.get("rows"))
    unit = {"ppo": "prompts", "kto": "completions"}.get(record.method, "pairs")
    on = f" with {rows:,.0f} {unit}" if rows is not None else ""
    steps, seconds = number(record.usage.get("steps")), number(record.usage.get("training_seconds"))
    took = f" in {steps:,.0f} steps" if steps is not None else ""
    took += f" and {show_seconds(seconds)}" if seconds is not None else ""
    rewarded = f", rewarded by {', '.join(map(str, record.reward))}" if record.reward else ""
    end = "" if record.finished is not None else " Training has not ended."
    method = _METHODS.get(record.method, record.method)
    return f"{method}: {trained}, trained{on}{took}{rewarded}.{end}{_result(headlines)}"


def _result(headlines: list[Headline]) -> str:
    if not headlines:
        return ""
    row = headlines[0].row
    interval = f" (95 % interval {row.after_interval})" if row.after_interval else ""
    before = f", {row.before} before" if row.before else ""
    label = row.label if row.label[:2].isupper() else row.label[:1].upper() + row.label[1:]
    return f" {label} on held-out data: {row.after}{interval}{before}."


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    facts = [("finished", _time(record.finished)), ("device", str(record.hardware.get("device_name") or MISSING))]
    if (peak := number(record.usage.get("peak_memory_bytes"))) is not None:
        facts.append(("peak memory", show_bytes(peak)))
    for name, value in record.seeds.items():
        facts.append((name.replace("_", " "), str(value)))
    return facts


def _time(text: str | None) -> str:
    return "not finished" if text is None else text.replace("T", " ").replace("+00:00", " UTC")


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    baseline = mapping(entry.get("baseline"))
    metrics = {name: value for name, value in mapping(entry["metrics"]).items() if name not in _UNTOLD_METRICS}
    rows = [row for name, value in metrics.items() if (row := _row(name, value, baseline.get(name))) is not None]
    return Evaluation(
        name=str(entry["name"]),
        rows=show_number(entry["rows"]),
        has_before=any(row.before for row in rows),
        metrics=rows,
        details=list(_flat(mapping(entry.get("details")))),
    )


def _row(name: str, value: Any, before_value: Any) -> Row | None:
    after, before = figure(value), figure(before_value)
    if after is None:
        return None
    share = is_share(name)
    if before is not None and name == "shorter":  # of the data, not of the model
        before = None
    change = "" if before is None else _change(before, after, share=share)
    return Row(
        name=name,
        label=_METRICS.get(name, name.replace("_", " ")),
        before="" if before is None else show_figure(before.value, share=share),
        before_interval="" if before is None else show_interval(before, share=share),
        after=show_figure(after.value, share=share),
        after_interval=show_interval(after, share=share),
        change=change,
        plot=interval_plot(after, before, _REFERENCES.get(name)),
    )


def _change(before: Figure, after: Figure, *, share: bool) -> str:
    difference = after.value - before.value
    if not difference:
        return "0"
    size = f"{100 * abs(difference):.1f} pt" if share else show_number(abs(difference))
    return ("+" if difference > 0 else "−") + size


def _headlines(evaluations: list[Evaluation]) -> list[Headline]:
    """The most telling metrics, each from the first evaluation that has it."""
    found = []
    for name in _HEADLINES:
        for evaluation in evaluations:
            row = next((row for row in evaluation.metrics if row.name == name), None)
            if row is not None:
                found.append(Headline(row, evaluation.name, evaluation.rows))
                break
    return found[:_MOST_HEADLINES]


def _sample(entry: Mapping[str, Any]) -> Sample:
    prompt, prompt_left = shortened(_text(entry["prompt"]))
    after, after_left = shortened(_text(entry["after"]))
    has_before = entry.get("before") is not None
    before, before_left = shortened(_text(entry["before"])) if has_before else ("", 0)
    left = {"prompt": prompt_left, "answer before": before_left, "answer after": after_left}
    rewards = tuple(number(entry.get(f"reward_{when}")) for when in ("before", "after"))
    return Sample(
        prompt=prompt,
        prompt_end=prompt[-_PROMPT_END:] if len(prompt) > 2 * _PROMPT_END else "",
        prompt_length=len(prompt) + prompt_left,
        before=before if has_before else None,
        compared=compare(before, after) if has_before else compare(after, after)._replace(note=""),
        is_long=max(len(before), len(after)) > FOLDED_CHARACTERS,
        left_out=[f"{count:,} characters of the {what} are left out" for what, count in left.items() if count],
        rewards=None if rewards == (None, None) else (show_number(rewards[0]), show_number(rewards[1])),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _dataset(entry: Mapping[str, Any]) -> Dataset:
    preparation = mapping(entry.get("preparation"))
    read, kept = number(preparation.get("rows_in")), number(preparation.get("rows_kept"))
    source = " ".join(str(entry[key]) for key in ("source", "split") if entry.get(key) is not None)
    facts = [("source", source or "rows in memory")]
    if entry.get("revision") is not None:
        facts.append(("revision", str(entry["revision"])))
    facts.append(("rows", show_number(entry.get("rows")) if entry.get("rows") is not None else "a stream"))
    if read:
        dropped = read - (kept or 0)
        facts.append(("rows read", f"{read:,.0f}"))
        facts.append(("dropped", f"{dropped:,.0f} ({100 * dropped / read:.1f} %)"))
    for key, label in (("truncated_completions", "answers truncated"), ("eos_lost", "rows that lost an end")):
        found = preparation.get(key)
        count = number(found.get("count") if isinstance(found, Mapping) else found)
        if count is not None:
            facts.append((label, f"{count:,.0f}"))
    return Dataset(
        name=str(entry["name"]),
        facts=facts,
        drops=[_drop(reason, mapping(found)) for reason, found in mapping(preparation.get("drops")).items()],
        lengths=[
            [part, *(show_number(mapping(lengths).get(key)) for key in ("min", "median", "p95", "max"))]
            for part, lengths in mapping(preparation.get("token_lengths")).items()
        ],
        sha256=str(entry.get("sha256") or ""),
    )


def _drop(reason: str, found: Mapping[str, Any]) -> tuple[str, str, str]:
    ids = found.get("row_ids")
    shown = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "") if isinstance(ids, list) else ""
    return reason, show_number(found.get("count")), shown


def _usage(record: RunRecord) -> list[tuple[str, str]]:
    usage = record.usage
    epochs = number(usage.get("epochs"))
    shown = {
        "steps": show_number(usage.get("steps")),
        "epochs": MISSING if epochs is None else f"{epochs:.4g}",
        "training time": show_seconds(usage.get("training_seconds")),
        "peak memory": show_bytes(usage.get("peak_memory_bytes")),
    }
    units = {
        "pairs_per_second": "pairs per second",
        "tokens_per_second": "tokens per second",
        "completions/tokens_per_second": "tokens generated per second",
    }
    told = ("steps", "epochs", "training_seconds", "peak_memory_bytes")
    others = {units.get(name, name): show_number(value) for name, value in usage.items() if name not in told}
    return [(name, value) for name, value in {**shown, **others}.items() if value != MISSING]


def _hardware(record: RunRecord) -> list[tuple[str, str]]:
    shown = {
        name: show_bytes(value) if name.endswith("_bytes") else str(value) for name, value in record.hardware.items()
    }
    rows = [(name.removesuffix("_bytes").replace("_", " "), value) for name, value in shown.items()]
    return rows if record.command is None else [*rows, ("command", record.command)]


def _model(record: RunRecord) -> list[tuple[str, str]]:
    rows = list(_flat({name: value for name, value in record.base.items() if value not in (None, [], "")}))
    adapter = {name: value for name, value in (record.adapter or {}).items() if value not in (None, [], False)}
    return [*rows, *((f"adapter: {name}", value) for name, value in _flat(adapter))]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested mappings, a line each."""
    for name, value in values.items():
        label = f"{prefix}{str(name).replace('_', ' ')}"
        found = figure(value)
        if isinstance(value, Mapping) and found is None:
            yield from _flat(value, f"{label}: ")
        elif isinstance(value, Mapping) and found is not None:
            share = is_share(str(name))
            yield label, f"{show_figure(found.value, share=share)} {show_interval(found, share=share)}".strip()
        elif found is not None:
            yield label, show_number(value)
        else:
            yield label, _setting(value)


def _setting(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        text = ", ".join(map(str, value)) or "none"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MOST_SETTING else f"{text[:_MOST_SETTING]}… ({len(text):,} characters)"
