"""Numbers out of a run record, which may hold anything JSON can, and how they are written for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignkit.hub.wording import duration, size

MISSING = "–"
_LARGEST = 1e30  # beyond, a curve's axis would say nothing, and differences overflow

# Metrics that are shares of something, shown in percent: by the last words of their names.
_SHARES = re.compile(
    r"(accurac(y|ies)|rate|share|fraction|consistency|resistance|shorter|longer|refusals?|finished|overall)$"
)


class Figure(NamedTuple):
    """A measured value and its 95 % interval; `low` and `high` are `None` where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def number(value: Any) -> float | None:
    """Return `value` if it is a number that can be drawn, else `None`; booleans are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None  # also not a number and infinite ones


def figure(value: Any) -> Figure | None:
    """Return the number, or the mapping with `value`, `low` and `high`, as a figure; `None` for anything else."""
    if isinstance(value, Mapping):
        measured, low, high = (number(value.get(key)) for key in ("value", "low", "high"))
        if measured is None:
            return None
        return Figure(measured, low, high) if low is not None and high is not None else Figure(measured)
    measured = number(value)
    return None if measured is None else Figure(measured)


def mapping(value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def both_sides(evaluation: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the metrics of an evaluation after and before."""
    return mapping(evaluation.get("metrics")), mapping(evaluation.get("baseline"))


def is_share(name: str) -> bool:
    """Whether a metric of this name lies between 0 and 1 and is shown in percent."""
    kind, _, _ = name.partition("/")
    return kind in ("subset", "section") or _SHARES.search(kind) is not None


def show_number(value: Any) -> str:
    """Write a number with about three significant digits; whole numbers whole; a dash for none."""
    found = number(value)
    if found is None:
        return MISSING
    magnitude = abs(found)
    if isinstance(value, int) or magnitude >= 1000:
        text = f"{found:,.0f}"
    elif magnitude >= 100:
        text = f"{found:.1f}"
    elif magnitude >= 10:
        text = f"{found:.2f}"
    elif magnitude >= 0.01 or magnitude == 0:
        text = f"{found:.3f}"
    else:
        text = f"{found:.1e}"
    return text.replace("-", "−") if "e" not in text else text


def show_figure(value: float, *, share: bool) -> str:
    """Write a metric's value: shares in percent."""
    return f"{100 * value:.1f} %".replace("-", "−") if share else show_number(float(value))


def show_interval(found: Figure, *, share: bool) -> str:
    """Write a metric's interval, or nothing where it has none."""
    if found.low is None or found.high is None:
        return ""
    scale = 100 if share else 1
    low, high = (
        f"{scale * end:.1f}".replace("-", "−") if share else show_number(end) for end in (found.low, found.high)
    )
    return f"[{low}, {high}]"


def show_bytes(value: Any) -> str:
    """Write a number of bytes as the card does."""
    found = number(value)
    return MISSING if found is None or found < 0 else size(found)


def show_seconds(value: Any) -> str:
    """Write a duration as the card does."""
    found = number(value)
    return MISSING if found is None or found < 0 else duration(found)
