"""How often a judge prefers a model's answers to a baseline's, asked in both orders."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.data.records import Text
from alignkit.errors import DataError, TrainingError
from alignkit.evaluation.estimates import (
    Estimate,
    accuracy_interval,
    as_floats,
    cluster_mean_interval,
    cluster_numbers,
)
from alignkit.evaluation.judges import Judge, ask, make_judge
from alignkit.evaluation.length_control import LengthControl, length_controlled_win_rate


@dataclass(frozen=True, slots=True)
class WinRate:
    """What a judge prefers.

    Attributes:
        judge: its name.
        rows: pairs of answers with a verdict in both orders.
        ties: those whose preference is one half: the same text, a tie, or a verdict that changed with the order.
        identical: pairs of the same text, which are not asked about.
        without_verdict: pairs that lack a verdict in either order; they are left out.
        win_rate: of the model over the baseline, ties as halves.
        length_controlled: the win rate at equal length.
        order_consistency: share of the pairs that were asked about whose two verdicts name the same answer, or no
            answer both times. None where nothing was asked.
        first_preferred: mean verdict for the answer that stood first, in both orders: one half for a fair judge.
        preferences: of the model's answer, `(N,)` in [0, 1], None where there is no verdict.
    """

    judge: str
    rows: int
    ties: int
    identical: int
    without_verdict: int
    win_rate: Estimate
    length_controlled: LengthControl
    order_consistency: Estimate | None
    first_preferred: float | None
    preferences: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        consistency = self.order_consistency
        return {
            "judge": self.judge,
            "rows": self.rows,
            "ties": self.ties,
            "identical": self.identical,
            "without_verdict": self.without_verdict,
            "win_rate": self.win_rate._asdict(),
            "length_controlled": self.length_controlled.as_dict(),
            "order_consistency": None if consistency is None else consistency._asdict(),
            "first_preferred": self.first_preferred,
            "preferences": list(self.preferences),
        }


def win_rate(
    prompts: Sequence[Text],
    answers: Sequence[str],
    baselines: Sequence[str],
    judge: Any,
    *,
    clusters: Sequence[Hashable] | None = None,
    quiet: bool = False,
) -> WinRate:
    """Ask a judge which of two answers is better, in both orders, and report the model's win rate over the baseline.

    The preference of a pair is the mean of the two verdicts. Where each prompt has one pair and verdicts are plain
    (first, second, tie), the interval is Wilson's; else it is a bootstrap that draws prompts. Lengths are characters.

    Args:
        prompts: text or messages.
        answers, baselines: of the model and of what it is compared with, one of each to every prompt.
        judge: as `make_judge` takes it.
        clusters: of each row, its prompt, where prompts have several pairs.
        quiet: show no progress.

    Raises:
        DataError: lists of different lengths, or nothing to judge.
        ModelError: a judge that does not give one verdict from 0 to 1 for each prompt.
        TrainingError: no pair has a verdict in both orders.
    """
    asked = make_judge(judge)
    both = both_orders(asked, prompts, answers, baselines, quiet=quiet)
    members: list[Hashable] = list(range(len(prompts)) if clusters is None else clusters)
    if len(members) != len(prompts):
        raise DataError(f"{len(members)} clusters for {len(prompts)} prompts: give one for each")
    found = {number: (one, other) for number, (one, other) in enumerate(both) if one is not None and other is not None}
    preferences = {number: (one + 1 - other) / 2 for number, (one, other) in found.items()}
    kept = list(found)
    if not kept:
        raise TrainingError(f"judge '{asked.name}' gave no pair a verdict in both orders, so there is no win rate")
    values = as_floats(list(preferences.values()))
    differences = as_floats([len(answers[number]) - len(baselines[number]) for number in kept])
    members = [members[number] for number in kept]
    compared = [found[number] for number in kept if answers[number] != baselines[number]]
    return WinRate(
        judge=asked.name,
        rows=len(kept),
        ties=int((values == 0.5).sum()),
        identical=len(kept) - len(compared),
        without_verdict=len(prompts) - len(kept),
        win_rate=preference_interval(values, members),
        length_controlled=length_controlled_win_rate(values, differences, members),
        order_consistency=_consistency(compared),
        first_preferred=float(np.mean(compared)) if compared else None,
        preferences=tuple(preferences.get(number) for number in range(len(prompts))),
    )


def both_orders(
    judge: Judge,
    prompts: Sequence[Text],
    answers: Sequence[str],
    baselines: Sequence[str],
    *,
    quiet: bool = False,
) -> list[tuple[float | None, float | None]]:
    """Return the verdicts for the answer that stood first: the model's, and then the baseline's. Same texts tie.

    Raises:
        DataError, ModelError: see `ask`.
    """
    if not len(prompts) == len(answers) == len(baselines) or not prompts:
        ask(judge, prompts, answers, baselines, quiet=True)  # says what is wrong
    verdicts: list[tuple[float | None, float | None]] = [(0.5, 0.5)] * len(prompts)
    differ = [number for number, answer in enumerate(answers) if answer != baselines[number]]
    if not differ:
        return verdicts
    texts = [prompts[number] for number in differ]
    ours, theirs = ([column[number] for number in differ] for column in (answers, baselines))
    forward = ask(judge, texts, ours, theirs, quiet=quiet)
    backward = ask(judge, texts, theirs, ours, quiet=quiet)
    for number, pair in zip(differ, zip(forward, backward, strict=True), strict=True):
        verdicts[number] = pair
    return verdicts


def preference_interval(preferences: Any, clusters: Sequence[Hashable]) -> Estimate:
    """Return the mean preference: Wilson's interval for plain verdicts on one pair a prompt, else a bootstrap.

    Where all preferences are the same a bootstrap has no width: the interval is Wilson's for that many prompts.
    """
    values = as_floats(preferences)
    count = int(cluster_numbers(clusters).max()) + 1
    one_each = count == len(values)
    if count == 1 or values.min() == values.max():
        _, low, high = accuracy_interval(float(values.mean()) * count, count)
        return Estimate(float(values.mean()), low, high)
    # Halves of halves come from a tie in one order alone.
    if one_each and bool(np.isin(values, (0.0, 0.25, 0.5, 0.75, 1.0)).all()):
        return accuracy_interval(float(values.sum()), len(values))
    return cluster_mean_interval(values, clusters)


def _consistency(pairs: Sequence[tuple[float, float]]) -> Estimate | None:
    if not pairs:
        return None
    same = sum(np.sign(one - 0.5) == np.sign(0.5 - other) for one, other in pairs)
    return accuracy_interval(int(same), len(pairs))
