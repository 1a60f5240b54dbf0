"""Which curves a run's log holds: one table of panels, which the report and the pictures draw alike."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignkit.evaluation.figures import number

Entry = Mapping[str, Any]
Log = Sequence[Entry]


class Point(NamedTuple):
    """One logged value; `y` is `None` where the log has something that is no number."""

    x: float
    y: float | None


class Series(NamedTuple):
    """A curve. `tone` numbers its colour within the panel; where a panel has several metrics, each has its colour."""

    label: str
    points: tuple[Point, ...]
    tone: int = 0
    is_held_out: bool = False

    @property
    def drawn(self) -> list[tuple[float, float]]:
        """The points that are numbers."""
        return [(x, y) for x, y in self.points if y is not None]

    @property
    def not_numbers(self) -> int:
        """How many points are no numbers."""
        return sum(y is None for _, y in self.points)


class Panel(NamedTuple):
    """Curves that share their axes.

    Attributes:
        key: a name for files and links.
        title, x_label, y_label: in words.
        series: at least one, each with at least one number.
        is_main: it belongs to what a run is judged by; the rest is for whoever looks for a cause.
        is_share: values lie between 0 and 1.
        reference: a value with a meaning of its own, such as chance, and
        reference_label: that meaning.
        is_path: points are connected in the order of time, and x is no time (the frontier).
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    is_main: bool = True
    is_share: bool = False
    reference: float | None = None
    reference_label: str = ""
    is_path: bool = False


class _Curve(NamedTuple):
    """A metric to look for: its label, and its names in the log, which bear a prefix where it is held out."""

    label: str
    names: tuple[str, ...]
    held_out: tuple[str, ...] = ()  # where they differ from `names`, without the prefix


class _Wanted(NamedTuple):
    key: str
    title: str
    y_label: str
    curves: tuple[_Curve, ...]
    is_main: bool = True
    is_share: bool = False
    reference: float | None = None
    reference_label: str = ""


_KL_UNIT = "nats per completion"
_WANTED = (
    _Wanted(
        "reward",
        "Reward",
        "mean of a rollout",
        (
            _Curve("reward", ("objective/scores",), held_out=("reward",)),
            _Curve("with KL penalty", ("objective/rlhf_reward",)),
        ),
    ),
    _Wanted(
        "kl",
        "KL from the reference",
        _KL_UNIT,
        (_Curve("KL", ("objective/kl", "kl"), held_out=("kl",)),),
        reference=0.0,
    ),
    _Wanted("loss", "Loss", "", (_Curve("loss", ("loss",)),)),
    _Wanted(
        "accuracy",
        "Reward accuracy",
        "share of pairs",
        (_Curve("accuracy", ("rewards/accuracies", "accuracy")),),
        is_share=True,
        reference=0.5,
        reference_label="chance",
    ),
    _Wanted(
        "margin",
        "Reward margin",
        "chosen − rejected",
        (_Curve("margin", ("rewards/margins", "margin")),),
        reference=0.0,
        reference_label="no preference",
    ),
    _Wanted(
        "rewards",
        "Rewards of both answers",
        "implicit reward",
        (_Curve("chosen", ("rewards/chosen",)), _Curve("rejected", ("rewards/rejected",))),
        reference=0.0,
        reference_label="as the reference",
    ),
    _Wanted(
        "reward_range",
        "Rewards given",
        "reward",
        (
            _Curve("mean", ("mean_reward",)),
            _Curve("lowest", ("min_reward",)),
            _Curve("highest", ("max_reward",)),
        ),
    ),
    _Wanted(
        "length",
        "Answer length",
        "tokens per completion",
        (_Curve("tokens", ("completions/mean_length",), held_out=("mean_length",)),),
    ),
    _Wanted(
        "endings",
        "Answers that end by themselves",
        "share",
        (_Curve("ended", ("completions/eos_rate",), held_out=("eos_rate",)),),
        is_share=True,
    ),
    _Wanted(
        "calibration",
        "Calibration error",
        "stated chance against outcome",
        (_Curve("error", ("calibration_error",)),),
        is_share=True,
    ),
    _Wanted(
        "logps",
        "Log-probabilities",
        "nats per completion",
        (_Curve("chosen", ("logps/chosen",)), _Curve("rejected", ("logps/rejected",))),
    ),
    _Wanted("entropy", "Entropy", "nats per token", (_Curve("entropy", ("entropy", "policy/entropy_avg")),), False),
    _Wanted("grad_norm", "Gradient norm", "before clipping", (_Curve("norm", ("grad_norm",)),)),
    _Wanted("learning_rate", "Learning rate", "", (_Curve("rate", ("learning_rate",)),), False),
    _Wanted(
        "ppo_losses",
        "PPO's losses",
        "per token",
        (_Curve("policy", ("loss/policy_avg",)), _Curve("value", ("loss/value_avg",))),
        is_main=False,
    ),
    _Wanted(
        "critic",
        "Explained variance of the critic",
        "share of the returns' variance",
        (_Curve("explained", ("val/explained_variance",)),),
        is_main=False,
        reference=0.0,
        reference_label="a constant",
    ),
    _Wanted(
        "clipped",
        "Clipped tokens",
        "share of tokens",
        (_Curve("policy", ("policy/clipfrac_avg",)), _Curve("value", ("val/clipfrac_avg",))),
        is_main=False,
        is_share=True,
    ),
)
# What says nothing about learning, or is told elsewhere: the axes, the clock, sums over the run, ends of intervals.
_UNTOLD = re.compile(
    r"^(step|epoch|episode|total_flos|peak_memory_bytes|train_\w+|val/num_eos_tokens)$|(^|_)runtime$|per_second$|_(low|high)$"
)
_MAX_OTHERS = 40


def panels(log: Log) -> list[Panel]:
    """Return the panels that a log fills: the main ones, the others, and one for each metric that has no place there.

    Args:
        log: `trainer.state.log_history`. What is no number in it becomes a gap.
    """
    axis, x_label = _axis(log)
    rows = [(x, entry) for x, entry in zip(axis, log, strict=True) if x is not None]
    prefixes = _prefixes(rows)
    told: set[str] = set()
    found = [panel for wanted in _WANTED if (panel := _panel(wanted, rows, prefixes, x_label, told)) is not None]
    path = _frontier(log)
    if path is not None:  # of PPO, whose loss says nothing by itself
        found = [each._replace(is_main=each.is_main and each.key != "loss") for each in found]
        found.insert(1 + next((index for index, each in enumerate(found) if each.key == "kl"), -1), path)
    names = {name for _, entry in rows for name in entry if name not in told}
    for prefix in prefixes:
        names = {name.removeprefix(prefix) for name in names}
    others = [_Wanted(name, name, "", (_Curve("", (name,)),), False) for name in sorted(names)]
    more = (_panel(wanted, rows, prefixes, x_label, told) for wanted in others if not _UNTOLD.search(wanted.key))
    return [*found, *itertools.islice((panel for panel in more if panel is not None), _MAX_OTHERS)]


def thinned(series: Series, most: int) -> Series:
    """Return a curve of at most `most` points, with the lowest and highest of each stretch, so that spikes stay.

    The first and the last point stay, and points that had a value between them that is no number stay apart.
    """
    points = series.points
    if len(points) <= most:
        return series
    # Of a stretch without gaps two points stay; between any two points that stay there may be a gap.
    stretches = max(1, (most - 2) // 2 if not series.not_numbers else (most - 3) // 4)
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    for index in range(stretches):
        stretch = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        values = [(y, place) for place in stretch if (y := points[place].y) is not None]
        if values:
            kept |= {min(values)[1], max(values)[1]}
    gaps = {
        next((place for place in range(first + 1, second) if points[place].y is None), first)
        for first, second in itertools.pairwise(sorted(kept))
    }
    return series._replace(points=tuple(points[place] for place in sorted(kept | gaps)))


def _axis(log: Log) -> tuple[list[float | None], str]:
    """Where each entry lies: by episode where training counts them, by step, or by its place in the log."""
    for name in ("episode", "step"):
        values = [number(entry.get(name)) for entry in log]
        measured = [value for value, entry in zip(values, log, strict=True) if not _is_summary(entry)]
        if measured and all(value is not None for value in measured):
            return [None if _is_summary(entry) else value for value, entry in zip(values, log, strict=True)], name
    return [float(index) for index in range(len(log))], "entry of the log"


def _is_summary(entry: Entry) -> bool:
    """Whether an entry tells of the whole run, as Trainer's last one does."""
    return "train_runtime" in entry


def _prefixes(rows: Sequence[tuple[float, Entry]]) -> list[str]:
    """What names of held-out metrics begin with, the longest first: Trainer logs the runtime of every evaluation."""
    clocks = {name for _, entry in rows for name in entry if name.startswith("eval_") and name.endswith("_runtime")}
    return sorted({"eval_", *(name.removesuffix("runtime") for name in clocks)}, key=len, reverse=True)


def _panel(
    wanted: _Wanted, rows: Sequence[tuple[float, Entry]], prefixes: Sequence[str], x_label: str, told: set[str]
) -> Panel | None:
    several = len(wanted.curves) > 1
    series: list[Series] = []
    for place, curve in enumerate(wanted.curves):
        names = [(name, "") for name in curve.names]
        names += [(prefix + name, prefix) for prefix in prefixes for name in curve.held_out or curve.names]
        for name, prefix in names:
            points = () if name in told else _points(rows, name)
            told.add(name)
            if any(y is not None for _, y in points):
                label = ", ".join(filter(None, [curve.label if several else "", _rows_of(prefix, several)]))
                series.append(Series(label, points, place if several else len(series), prefix != ""))
    if not series:
        return None
    return Panel(
        wanted.key,
        wanted.title,
        x_label,
        wanted.y_label,
        tuple(series),
        wanted.is_main,
        wanted.is_share,
        wanted.reference,
        wanted.reference_label,
    )


def _rows_of(prefix: str, several: bool) -> str:
    """Which rows a curve with this prefix tells of; of training, only where the label says nothing else."""
    of_set = prefix.removeprefix("eval_").removesuffix("_")
    if not prefix:
        return "" if several else "training"
    return f"held out ({of_set})" if of_set else "held out"


def _points(rows: Sequence[tuple[float, Entry]], name: str) -> tuple[Point, ...]:
    return tuple(Point(x, number(entry[name])) for x, entry in rows if name in entry)


def _frontier(log: Log) -> Panel | None:
    """What a PPO run pays in KL for its reward (Gao et al. 2023, arXiv 2210.10760)."""
    pairs = [(number(entry.get("objective/kl")), number(entry.get("objective/scores"))) for entry in log]
    points = tuple(Point(kl, score) for kl, score in pairs if kl is not None and score is not None)
    if len(points) < 2:
        return None
    series = (Series("rollouts, in their order", points),)
    return Panel("frontier", "Reward against KL", f"KL ({_KL_UNIT})", "mean of a rollout", series, is_path=True)
