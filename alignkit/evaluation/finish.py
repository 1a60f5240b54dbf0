"""The end of a recipe: what was measured goes into the run's record, and the record into files for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.evaluation.generation import Answers
from alignkit.evaluation.html import write_report
from alignkit.evaluation.pictures import write_pictures
from alignkit.evaluation.preference import PreferenceSummary
from alignkit.evaluation.rollouts import RatedAnswer, RolloutSummary, reward_change
from alignkit.hub.card import write_card
from alignkit.hub.record import RunRecord
from alignkit.hub.wording import HELD_OUT_PREFERENCES

HELD_OUT_ANSWERS = "greedy answers to held-out prompts"


class Written(NamedTuple):
    """Files that describe a run."""

    record: Path
    report: Path
    card: Path
    pictures: tuple[Path, ...]

    def lines(self) -> str:
        """Where they are, one a line."""
        named = {"Report": self.report, "Model card": self.card, "Run record": self.record}
        drawn = "".join(f"\nPicture: {path}" for path in self.pictures)
        return "\n".join(f"{name}: {path}" for name, path in named.items()) + drawn


def finish_run(record: RunRecord, folder: str | Path) -> Written:
    """Write a run's record, pictures, report and card into `folder`."""
    path = record.save(folder)
    pictures = tuple(write_pictures(record, folder))
    return Written(path, write_report(record, folder), write_card(folder, record), pictures)


def record_preferences(record: RunRecord, before: PreferenceSummary, after: PreferenceSummary) -> None:
    """Add held-out preferences before and after to a record."""
    metrics, baseline = _preference_metrics(after), _preference_metrics(before)
    details = {"ties_before": before.ties, "ties_after": after.ties, "is_paired": after.is_paired}
    record.add_evaluation(HELD_OUT_PREFERENCES, metrics, rows=after.rows, baseline=baseline, details=details)


def _preference_metrics(summary: PreferenceSummary) -> dict[str, Any]:
    return {
        "loss": summary.loss,
        "accuracy": summary.accuracy,
        "margin": summary.margin,
        "shorter": summary.shorter,
    }


def record_rollouts(record: RunRecord, before: RolloutSummary, after: RolloutSummary) -> None:
    """Add greedy answers before and after PPO to a record: their figures, and the answers one by one."""
    baseline = _rollout_metrics(before)
    metrics = {**_rollout_metrics(after), "reward_change": reward_change(before, after)}
    record.add_evaluation(HELD_OUT_ANSWERS, metrics, rows=len(after.answers), baseline=baseline)
    old = {answer.row: answer for answer in before.answers}
    record.samples = [_rated_sample(old[answer.row], answer) for answer in after.answers]


def _rollout_metrics(summary: RolloutSummary) -> dict[str, Any]:
    return {"reward": summary.reward, "kl": summary.kl, "tokens": summary.tokens, "eos_rate": summary.eos_rate}


def _rated_sample(before: RatedAnswer, after: RatedAnswer) -> dict[str, Any]:
    return {
        "prompt": after.prompt,
        "before": before.answer,
        "after": after.answer,
        "reward_before": before.reward,
        "reward_after": after.reward,
    }


def record_answers(record: RunRecord, answers: Sequence[Answers]) -> None:
    """Keep answers side by side in a record."""
    record.samples = [{"prompt": each.prompt, "before": each.reference, "after": each.policy} for each in answers]
