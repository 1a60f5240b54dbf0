"""The run record: one JSON file that says what a run was made of, what it did and what was measured.

Trainers write it, evaluations add to it, and the report, the model card and the publication read it. It holds no
secrets and no paths of the machine, so that it can be published as it is.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import numpy as np

from alignkit.errors import DataError, nearest
from alignkit.hub.record_shape import first_fault

RECORD_FILE = "run_record.json"
FORMAT = "alignkit-run-record"
VERSION = 1

_MAX_BYTES = 256 * 2**20


@dataclass(slots=True)
class RunRecord:
    """Everything that is known of one run.

    Attributes:
        method: "dpo", "kto", "reward" or "ppo".
        alignkit: version of the package.
        created, finished: ISO 8601, UTC; `finished` is `None` until training has ended.
        command: the command line, without paths of the machine; `None` in a notebook.
        base: the model that was started from, see `alignkit.hub.identity.describe_base`, and `is_chat`: whether its
            tokenizer has a chat template.
        adapter: what was trained on it, see `describe_adapter`; `None` where the model was trained whole.
        data: one entry per dataset: see `describe_data`.
        reward: names of what rewarded completions (PPO), else empty.
        settings: every option of the run that has a value; `changed` names those that are not the defaults.
        versions, hardware, seeds: of the run, by name.
        usage: steps, seconds, peak memory in bytes, speed.
        evaluations: `{"name", "rows", "metrics", "baseline", "details"}` each; a metric is a number, or a mapping with
            `value`, `low` and `high`.
        samples: `{"prompt", "before", "after"}` each; `before` may be `None`.
        log: `trainer.state.log_history`.
        notes: what readers should know and figures do not say, in sentences; the card shows them.
        audit: what an audit of the data found; `None` where none was made.
    """

    method: str
    alignkit: str
    created: str
    base: dict[str, Any]
    adapter: dict[str, Any] | None = None
    finished: str | None = None
    command: str | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    reward: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    audit: dict[str, Any] | None = None

    def add_evaluation(
        self,
        name: str,
        metrics: Mapping[str, Any],
        *,
        rows: int,
        baseline: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Add what was measured; an earlier evaluation of the same name is replaced.

        Args:
            name: what was measured, on what, in words.
            metrics: numbers, or anything with `value`, `low` and `high`, by name.
            rows: how many rows, prompts or answers it was measured on.
            baseline: the same metrics of what the run started from.
            details: anything else that JSON can hold. `other_run: True` marks figures of a run that this one is
                compared with.
        """
        entry: dict[str, Any] = {"name": name, "rows": rows, "metrics": plain(metrics)}
        entry["baseline"] = None if baseline is None else plain(baseline)
        entry["details"] = plain(details or {})
        self.evaluations = [*(each for each in self.evaluations if each["name"] != name), entry]

    def evaluation(self, name: str) -> dict[str, Any] | None:
        """Return the evaluation of that name, or `None`."""
        return next((each for each in self.evaluations if each["name"] == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the format's name and version first."""
        return {"format": FORMAT, "version": VERSION, **plain(asdict(self))}

    def save(self, folder: str | Path) -> Path:
        """Write `run_record.json` into `folder`, through a temporary file; return its path."""
        return write_json(Path(folder) / RECORD_FILE, self.as_dict())

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a record from a run's folder, or from a file.

        Raises:
            DataError: there is none, or it is not a run record that this version reads.
        """
        path = Path(path).expanduser()
        file = path / RECORD_FILE if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"'{path}' holds no {RECORD_FILE}: give the output directory of a run that alignkit's trainers made."
            )
        if file.stat().st_size > _MAX_BYTES:
            raise DataError(f"'{file}' is larger than {_MAX_BYTES // 2**20} MiB, which no run record is.")
        try:
            found = plain(json.loads(file.read_text(encoding="utf-8")))  # NaN, which is no JSON, is nothing here either
        except (ValueError, RecursionError) as error:
            raise DataError(f"'{file}' is not JSON that can be read: {error}") from error
        return cls.from_dict(found, where=str(file))

    @classmethod
    def from_dict(cls, values: Any, *, where: str = "the record") -> RunRecord:
        """Make a record from what `as_dict` returned.

        Raises:
            DataError: another format, a newer version, or fields that are missing, unknown or of a wrong type.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise DataError(f"{where} is no run record: it does not say 'format': '{FORMAT}'.")
        if values.get("version") != VERSION:
            raise DataError(
                f"{where} has version {values.get('version')!r}, and this alignkit reads {VERSION}: update alignkit."
            )
        given = {name: value for name, value in values.items() if name not in ("format", "version")}
        known = {each.name: each for each in fields(cls)}
        for name in given:
            if name not in known:
                raise DataError(f"{where} has an unknown field {name!r}.{nearest(name, known)}")
        for name in ("method", "alignkit", "created", "base"):
            if name not in given:
                raise DataError(f"{where} lacks the field {name!r}.")
        for name, value in given.items():
            _check_type(name, value, where)
        fault = first_fault(given)
        if fault is not None:
            raise DataError(f"{where}: {fault.place} {fault.what}.")
        return cls(**given)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "alignkit": str,
    "created": str,
    "base": dict,
    "adapter": (dict, type(None)),
    "finished": (str, type(None)),
    "command": (str, type(None)),
    "audit": (dict, type(None)),
    **dict.fromkeys(("settings", "versions", "hardware", "seeds", "usage"), dict),
    **dict.fromkeys(("data", "reward", "changed", "evaluations", "samples", "log", "notes"), list),
}
_NEEDED_KEYS = {
    "evaluations": ("name", "rows", "metrics"),
    "samples": ("prompt", "after"),
    "data": ("name",),
    "log": (),
}


def _check_type(name: str, value: Any, where: str) -> None:
    if not isinstance(value, _TYPES[name]):
        raise DataError(f"{where}: the field {name!r} is a {type(value).__name__}, which it cannot be.")
    needed = _NEEDED_KEYS.get(name)
    for entry in value if needed is not None else ():
        if not isinstance(entry, dict) or any(key not in entry for key in needed or ()):
            raise DataError(f"{where}: an entry of {name!r} is no mapping with {', '.join(needed or ()) or 'keys'}.")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """Turn dataclasses and named tuples into mappings, sequences into lists, and numbers that JSON lacks into None.

    Raises:
        TypeError: something that JSON cannot hold.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif isinstance(value, tuple) and type(value) is not tuple:
        value = cast(Any, value)._asdict()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):  # NumPy's too
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} is nothing that JSON can hold")


def write_json(path: Path, value: Any) -> Path:
    """Write `value` to `path` as JSON, as `write_text` does.

    Raises:
        TypeError: something that JSON cannot hold; nothing is written then.
    """
    return write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` through a temporary file beside it, making folders as needed; return the path.

    The file has the rights that the process gives to new files, and what UTF-8 cannot hold is escaped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
