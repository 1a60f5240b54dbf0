"""What stands in a run record: each place with what it may hold, so that whoever reads one need not ask again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

_LARGEST = 1e300  # an integer beyond it is no float


class Fault(NamedTuple):
    """A place of a record, such as `base.parameters`, and what is wrong there."""

    place: str
    what: str


class Kind(NamedTuple):
    """What a place may hold: a test, and its words."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST if isinstance(value, int) else not math.isinf(value)


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_metric(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None or isinstance(value, bool | str) or _is_number(value)
    ends = [value.get(name) for name in ("value", "low", "high")]
    return all(each is None or _is_number(each) for each in ends)


def _is_metrics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_metric, value.values()))


def _is_preparation(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    drops = value.get("drops", {})
    return isinstance(drops, Mapping) and all(
        isinstance(each, Mapping) and _is_number(each.get("count")) for each in drops.values()
    )


TEXT = Kind("a text", lambda value: isinstance(value, str))
NUMBER = Kind("a number", _is_number)
WORDS = Kind("a list of texts", _is_words)
METRICS = Kind("a mapping of numbers, or of `value`, `low` and `high`", _is_metrics)
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
PREPARATION = Kind("a mapping whose `drops` have a `count`", _is_preparation)

# A dot leads into a mapping, `[]` into each entry of a list; `!` marks what must be there. The rest may be missing.
_SHAPE: Mapping[str, Kind] = {
    "base.name!": TEXT,
    "base.hub_id": _or_null(TEXT),
    "base.revision": _or_null(TEXT),
    "base.note": _or_null(TEXT),
    "base.license": _or_null(TEXT),
    "base.language": _or_null(WORDS),
    "base.parameters!": NUMBER,
    "base.dtype": _or_null(TEXT),
    "base.quantization": _or_null(TEXT),
    "adapter.kind!": TEXT,
    "adapter.trainable_parameters!": NUMBER,
    "reward": WORDS,
    "changed": WORDS,
    "notes": WORDS,
    "hardware.processes": NUMBER,
    "hardware.threads": _or_null(NUMBER),
    "usage.steps": _or_null(NUMBER),
    "usage.resumed_from_step": _or_null(NUMBER),
    "usage.training_seconds": _or_null(NUMBER),
    "usage.peak_memory_bytes": _or_null(NUMBER),
    "data[].name!": TEXT,
    "data[].source": _or_null(TEXT),
    "data[].hub_id": _or_null(TEXT),
    "data[].revision": _or_null(TEXT),
    "data[].rows": _or_null(NUMBER),
    "data[].sha256": _or_null(TEXT),
    "data[].preparation": _or_null(PREPARATION),
    "evaluations[].name!": TEXT,
    "evaluations[].rows!": NUMBER,
    "evaluations[].metrics!": METRICS,
    "evaluations[].baseline": _or_null(METRICS),
    "evaluations[].details": _or_null(MAPPING),
    "samples[].prompt!": TEXT,
    "samples[].before": _or_null(TEXT),
    "samples[].after!": TEXT,
}


def first_fault(record: Mapping[str, Any]) -> Fault | None:
    """Return the first place of a record's mapping that does not hold what it must, or `None`."""
    for path, kind in _SHAPE.items():
        for fault in _faults(record, path, kind):
            return fault
    return None


def _faults(record: Mapping[str, Any], path: str, kind: Kind) -> Iterator[Fault]:
    outer, dot, key = path.rstrip("!").partition(".")
    field = outer.removesuffix("[]")
    found = record.get(field)
    if not dot:
        if found is not None and not kind.holds(found):
            yield Fault(field, f"must be {kind.words}")
        return
    entries = (
        {field: found} if field == outer else {f"{field}[{number}]": each for number, each in enumerate(found or ())}
    )
    for place, entry in entries.items():
        if entry is None:
            continue
        if key not in entry:
            if path.endswith("!"):
                yield Fault(place, f"lacks {key!r}")
        elif not kind.holds(entry[key]):
            yield Fault(f"{place}.{key}", f"must be {kind.words}")
