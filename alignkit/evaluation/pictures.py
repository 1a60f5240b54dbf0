"""A run's curves as PNG pictures, for pages that hold no HTML; they need matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from alignkit.evaluation.curves import Panel, Series, panels
from alignkit.hub.record import RunRecord

logger = logging.getLogger(__name__)

PANEL_INCHES = (6.4, 4.0)
_MOST_DOTS = 60
_MARKS = str.maketrans({"$": r"\$", "\\": "/"})


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
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('No picture of the run: matplotlib is missing (pip install "alignkit[plot]").')
        return []
    if not shown:
        logger.warning("No picture of the run: the log holds none.")
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [_picture(panel, Path(folder) / f"{panel.key}.png") for panel in shown]


def _picture(panel: Panel, path: Path) -> Path:
    """Draw a panel, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure.add_subplot(), panel)
    figure.savefig(path, dpi=150, format="png")
    return path


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
