"""A run's curves as pictures, out of `trainer.state.log_history`; they need matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Log = Sequence[Mapping[str, float]]

PANEL_INCHES = (6.4, 4.0)
# Names of the margin in the log of a policy and of a reward model.
_MARGINS = {"training": ("rewards/margins", "margin"), "held out": ("eval_rewards/margins", "eval_margin")}
_KL = "KL from the reference (nats per completion)"


def margin_curve(log_history: Log, path: str | Path) -> Path | None:
    """Draw the reward margin over the steps of a log; return the picture's path.

    Without matplotlib, or without a margin in the log, this says so in one line of log and returns None.
    """
    curves = {name: _points(log_history, "step", *keys) for name, keys in _MARGINS.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not _can_draw("the margin", curves):
        return None
    figure, (axes,) = _figure(1)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if name == "held out" else None)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="reward margin (chosen - rejected)")
    axes.legend()
    return _save(figure, path)


def rollout_curves(runs: Mapping[str, Log], path: str | Path) -> Path | None:
    """Draw what PPO runs reached: reward and KL over their episodes, and the one against the other.

    The third panel is the frontier (Gao et al. 2023, arXiv 2210.10760): what a run pays in KL for its reward.

    Args:
        runs: the log of each run by the name that the legend gives it.
        path: the picture, PNG.

    Returns:
        The picture's path. Without matplotlib, or without a rollout in the logs, this says so in one line of log and
        returns None.
    """
    scores = {name: _points(log, "episode", "objective/scores") for name, log in runs.items()}
    scores = {name: points for name, points in scores.items() if points}
    if not _can_draw("the rollouts", scores):
        return None
    figure, (reward, kl, frontier) = _figure(3)
    for name, points in scores.items():
        reward.plot(*zip(*points, strict=True), label=name)
        kl.plot(*zip(*_points(runs[name], "episode", "objective/kl"), strict=True), label=name)
        pairs = _points(runs[name], "objective/kl", "objective/scores")
        frontier.plot(*zip(*pairs, strict=True), label=name, marker="o", markersize=3, linewidth=0.6)
    reward.set(xlabel="episode", ylabel="mean reward of a rollout")
    kl.set(xlabel="episode", ylabel=_KL)
    frontier.set(xlabel=_KL, ylabel="mean reward of a rollout")
    reward.legend()
    return _save(figure, path)


def _points(log: Log, x: str, *keys: str) -> list[tuple[float, float]]:
    return [(entry[x], entry[key]) for entry in log for key in keys if x in entry and key in entry]


def _can_draw(what: str, curves: Mapping[str, Any]) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('No picture of %s: matplotlib is missing (pip install "alignkit[plot]").', what)
        return False
    if not curves:
        logger.warning("No picture of %s: the log holds none.", what)
    return bool(curves)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """An empty figure of panels side by side, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, number) for number in range(1, panels + 1)]


def _save(figure: Any, path: str | Path) -> Path:
    figure.savefig(path, dpi=150, format="png")
    return Path(path)
