"""A run's curves as PNG pictures, for pages that hold no HTML; they need matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.evaluation.curves import Log, Panel, Series, panels
from alignkit.hub.record import RunRecord

logger = logging.getLogger(__name__)

PANEL_INCHES = (6.4, 4.0)
_MOST_DOTS = 60
_MARKS = str.maketrans({"$": r"\$", "\\": "/"})
_ROLLOUT_PANELS = ("reward", "kl", "frontier")


def write_pictures(record: RunRecord, folder: str | Path) -> list[Path]:
    """Draw what a run's log holds: one PNG for each main panel of the report, named after it.

    Args:
        record: of a run.
        folder: where they go; made as needed.

    Returns:
        The pictures' paths. Without matplotlib, or without a curve in the log, this says so in one line of log and
        returns an empty list.
    """
    shown = [panel for panel in panels(record.log) if panel.is_main]
    if not _can_draw("the run", shown):
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [_picture([panel], Path(folder) / f"{panel.key}.png") for panel in shown]


def margin_curve(log_history: Log, path: str | Path) -> Path | None:
    """Draw the reward margin over the steps of a log; return the picture's path.

    Without matplotlib, or without a margin in the log, this says so in one line of log and returns None.
    """
    shown = [panel for panel in panels(log_history) if panel.key == "margin"]
    return _picture(shown, path) if _can_draw("the margin", shown) else None


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
    found = {name: {panel.key: panel for panel in panels(log)} for name, log in runs.items()}
    shown = []
    for key in _ROLLOUT_PANELS:
        of_runs = {name: by_key[key] for name, by_key in found.items() if key in by_key}
        if of_runs:
            series = tuple(
                panel.series[0]._replace(label=name, tone=tone) for tone, (name, panel) in enumerate(of_runs.items())
            )
            shown.append(next(iter(of_runs.values()))._replace(series=series))
    return _picture(shown, path) if _can_draw("the rollouts", shown) else None


def _can_draw(what: str, shown: list[Panel]) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('No picture of %s: matplotlib is missing (pip install "alignkit[plot]").', what)
        return False
    if not shown:
        logger.warning("No picture of %s: the log holds none.", what)
    return bool(shown)


def _picture(shown: list[Panel], path: str | Path) -> Path:
    """Draw panels side by side, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(shown), height), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(shown, start=1):
        _draw(figure.add_subplot(1, len(shown), number), panel)
    figure.savefig(path, dpi=150, format="png")
    return Path(path)


def _draw(axes: Any, panel: Panel) -> None:
    for curve in panel.series:
        _draw_curve(axes, curve, is_path=panel.is_path)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="gray", linewidth=0.8, linestyle=":")
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.legend()


def _draw_curve(axes: Any, curve: Series, *, is_path: bool) -> None:
    xs = [x for x, _ in curve.points]
    ys = [float("nan") if y is None else y for _, y in curve.points]  # a gap
    axes.plot(
        xs,
        ys,
        label=_plain(curve.label),
        color=f"C{curve.tone % 10}",
        linestyle="--" if curve.is_held_out else "-",
        linewidth=0.6 if is_path else 1.5,
        marker="o" if is_path or len(xs) <= _MOST_DOTS else None,
        markersize=3,
    )


def _plain(text: str) -> str:
    """A name that others gave, without what matplotlib reads as mathematics or as no label, and what its font lacks."""
    return text.encode("ascii", "replace").decode().translate(_MARKS).lstrip("_")
