"""Names and figures of a run record in words, for the card, the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS = {
    "sft": "supervised fine-tuning (TRL's SFTTrainer)",
    "dpo": "direct preference optimization (DPO, arXiv 2305.18290)",
    "kto": "Kahneman-Tversky optimization (KTO, arXiv 2402.01306)",
    "reward": "a Bradley-Terry reward model",
    "ppo": "proximal policy optimization (PPO, arXiv 1707.06347) with a KL penalty",
}

_TITLES = {
    "accuracy": "reward accuracy",
    "margin": "reward margin",
    "shorter": 'accuracy of "prefer the shorter"',
    "calibration_error": "calibration error",
    "reward_change": "change of the reward, prompt by prompt",
    "kl": "KL from the reference (nats per answer)",
    "tokens": "tokens per answer",
    "eos_rate": "answers that ended by themselves",
}


# What a preference recipe measures before and after, on rows that it does not train on.
HELD_OUT_PREFERENCES = "held-out preferences"

_EVALUATIONS = {
    "preferences": "preferences",
    "answers": "answers of the policy and of its reference",
    "kl": "KL from the reference, on sampled answers",
    "win_rate": "win rate against the reference",
    "injections": "verdicts that text inside an answer turned",
    "perplexity": "perplexity",
    "reward_bench": "accuracy by subset",
    "frontier": "reward and KL of the run's checkpoints",
}


def evaluation_title(name: str) -> str:
    """What an evaluation is called for people."""
    return _EVALUATIONS.get(name, name)


def metric_title(name: str) -> str:
    """What a metric is called for people."""
    return _TITLES.get(name, name.replace("_", " "))


def value_of(metric: Any) -> float | None:
    """The number of a metric, with or without an interval."""
    value = metric.get("value") if isinstance(metric, Mapping) else metric
    return None if value is None or isinstance(value, bool | str) else float(value)


def figure(metric: Any, digits: int = 3) -> str:
    """A metric as text: `0.644 [0.588, 0.696]`, or the number alone; a dash where there is none."""
    value = value_of(metric)
    if value is None:
        return "–"
    if not isinstance(metric, Mapping) or metric.get("low") is None or metric.get("high") is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"


def size(count_bytes: float) -> str:
    """Bytes as GB (10⁹), MB or kB."""
    if count_bytes >= 1e9:
        return f"{count_bytes / 1e9:.2f} GB"
    return f"{count_bytes / 1e6:.0f} MB" if count_bytes >= 1e6 else f"{count_bytes / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Seconds as `1 h 05 min`, `18 min` or `42 s`."""
    if seconds < 60:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def training_time(usage: Mapping[str, Any]) -> str:
    """Steps and the time that they took; of a resumed run, only the steps since then took it."""
    steps, before = usage.get("steps") or 0, usage.get("resumed_from_step")
    took = duration(usage["training_seconds"])
    if not before:
        return f"{steps} optimizer steps in {took}"
    return f"{steps} optimizer steps, resumed after {before}; the last {steps - before} in {took}"


def evaluated_on(evaluation: Mapping[str, Any]) -> str | None:
    """The data of an evaluation in words, where it says which; those of a recipe are the run's own held-out rows."""
    data = (evaluation.get("details") or {}).get("data")
    if not isinstance(data, Mapping) or not data.get("source"):
        return None
    return f"{data['source']}, split {data['split']}" if data.get("split") else str(data["source"])


def count(number: int) -> str:
    """A large number as `134.5M` or `8.03B`."""
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number:,}"


def base_name(base: Mapping[str, Any]) -> str:
    """The base as it is told: its Hub id, or its name where it is a local model."""
    return str(base.get("hub_id") or base["name"])
