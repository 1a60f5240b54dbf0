"""The reward-KL frontier of checkpoints as a picture; it needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from alignkit.evaluation.estimates import Estimate
from alignkit.evaluation.frontier import FrontierPoint
from alignkit.evaluation.pictures import PANEL_INCHES

logger = logging.getLogger(__name__)


def frontier_curve(points: Sequence[FrontierPoint], path: str | Path) -> Path | None:
    """Draw reward against KL, each with its 95 % interval, connected in the order given; return the picture's path.

    Without matplotlib, or without a point, this says so in one line of log and returns None.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('No picture of the frontier: matplotlib is missing (pip install "alignkit[plot]").')
        return None
    if not points:
        logger.warning("No picture of the frontier: there is no checkpoint on it.")
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kls, rewards = [point.kl for point in points], [point.reward for point in points]
    across, up = [kl.value for kl in kls], [reward.value for reward in rewards]
    axes.errorbar(
        across, up, xerr=_reach(kls), yerr=_reach(rewards), marker="o", markersize=4, linewidth=0.8, capsize=2
    )
    for point, place in zip(points, zip(across, up, strict=True), strict=True):
        axes.annotate(point.name, place, textcoords="offset points", xytext=(4, 4), fontsize=7, parse_math=False)
    axes.set_xlabel("KL from the reference (nats per completion)")
    axes.set_ylabel("mean reward")
    figure.savefig(path, dpi=150, format="png")
    return Path(path)


def _reach(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far intervals reach below and above their values; 0 where an interval has no end."""
    below = [one.value - one.low if math.isfinite(one.low) else 0.0 for one in estimates]
    above = [one.high - one.value if math.isfinite(one.high) else 0.0 for one in estimates]
    return [below, above]
