"""What the report shows of a run record, section by section, as plain values that the template writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignkit.evaluation.figures import (
    MISSING,
    mapping,
    number,
    show_bytes,
    show_number,
    show_seconds,
)
from alignkit.evaluation.html_tables import Evaluation, Headline, evaluation_table, flat, headlines_of, setting
from alignkit.evaluation.html_text import FOLDED_CHARACTERS, Compared, compare, shortened
from alignkit.hub.record import RunRecord

SAFETY = "safety"  # names of evaluations that belong into the safety table begin with it
_MOST_SAMPLES = 24
_PROMPT_END = 220  # characters of a long prompt that are shown unfolded: its last ones, where the question is

_METHODS = {"dpo": "DPO", "kto": "KTO", "ppo": "PPO", "reward": "Reward model"}


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
    evaluations = [evaluation_table(each) for each in record.evaluations]
    headlines = headlines_of(evaluations)
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
        audit=list(flat(record.audit or {})),
        changed=[(name, setting(record.settings[name])) for name in record.changed if name in record.settings],
        defaults=[(name, setting(value)) for name, value in record.settings.items() if name not in record.changed],
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
    rows = list(flat({name: value for name, value in record.base.items() if value not in (None, [], "")}))
    adapter = {name: value for name, value in (record.adapter or {}).items() if value not in (None, [], False)}
    return [*rows, *((f"adapter: {name}", value) for name, value in flat(adapter))]
