"""The run record: written whole, read strictly."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignkit.errors import DataError
from alignkit.evaluation.estimates import Estimate, single_value
from alignkit.hub.card import render_card
from alignkit.hub.record import RECORD_FILE, RunRecord, plain
from tests.hub.record_factory import make_record


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    record = make_record()
    path = record.save(tmp_path / "new")
    assert path == tmp_path / "new" / RECORD_FILE
    assert RunRecord.load(tmp_path / "new") == record
    assert RunRecord.load(path) == record
    assert [entry.name for entry in path.parent.iterdir()] == [RECORD_FILE]


def test_numbers_that_json_lacks_are_null_and_intervals_are_mappings(tmp_path: Path) -> None:
    record = make_record(log=[{"loss": math.nan, "grad_norm": math.inf, "step": 3}], evaluations=[])
    record.add_evaluation("x", {"accuracy": Estimate(0.5, 0.4, 0.6)}, rows=10)
    found = json.loads(record.save(tmp_path).read_text(encoding="utf-8"))
    assert found["log"] == [{"loss": None, "grad_norm": None, "step": 3}]
    assert found["evaluations"][0]["metrics"] == {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = make_record().save(tmp_path)
    old = path.read_bytes()
    with pytest.raises(TypeError, match="object is nothing that JSON can hold"):
        make_record(settings={"x": object()}).save(tmp_path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == [RECORD_FILE]


def test_an_evaluation_of_the_same_name_replaces_the_old_one() -> None:
    record = make_record()
    record.add_evaluation("other", {"loss": 1.0}, rows=1)
    record.add_evaluation("held-out preferences", {"loss": 0.5}, rows=7)
    assert [each["name"] for each in record.evaluations] == ["other", "held-out preferences"]
    found = record.evaluation("held-out preferences")
    assert found is not None
    assert found["rows"] == 7
    assert record.evaluation("none") is None


def test_no_record_is_told_by_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no run_record\.json: give the output directory of a run"):
        RunRecord.load(tmp_path)


VALID = make_record().as_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON that can be read"),
        ("[" * 100_000, "is not JSON that can be read"),
        ("[]", "is no run record"),
        (json.dumps({**VALID, "format": "other"}), "is no run record"),
        (json.dumps({**VALID, "version": 2}), "has version 2, and this alignkit reads 1: update alignkit"),
        (json.dumps({**VALID, "setings": {}}), r"unknown field 'setings'\. Did you mean 'settings'\?"),
        (json.dumps({k: v for k, v in VALID.items() if k != "base"}), "lacks the field 'base'"),
        (json.dumps({**VALID, "log": {}}), "the field 'log' is a dict, which it cannot be"),
        (json.dumps({**VALID, "log": [3]}), "an entry of 'log' is no mapping"),
        (json.dumps({**VALID, "samples": [{"prompt": "x"}]}), "an entry of 'samples' is no mapping with prompt, after"),
        (json.dumps({**VALID, "base": {}}), "base lacks 'name'"),
        (json.dumps({**VALID, "base": {**VALID["base"], "parameters": 10**400}}), r"base\.parameters must be a number"),
        (json.dumps({**VALID, "changed": [[]]}), "changed must be a list of texts"),
        (json.dumps({**VALID, "data": [{"name": 3}]}), r"data\[0\]\.name must be a text"),
        (
            json.dumps({**VALID, "usage": {"training_seconds": "x"}}),
            r"usage\.training_seconds must be a number or null",
        ),
        (
            json.dumps({**VALID, "evaluations": [{"name": "x", "rows": 1, "metrics": {"a": {"value": "b"}}}]}),
            r"evaluations\[0\]\.metrics must be a mapping of numbers",
        ),
        (json.dumps({**VALID, "evaluations": [{"name": "x"}]}), "an entry of 'evaluations' is no mapping with name"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        RunRecord.load(tmp_path)


def test_estimates_and_numbers_of_numpy_are_plain() -> None:
    value = {
        "a": single_value(1.5),
        "b": [math.nan, np.float64(2.0), np.int64(3), np.bool_(True)],
        "c": Estimate(0.5, -math.inf, 1),
        "d": Estimate(math.nan, 0.0, 1.0),
    }
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "a": {"value": 1.5, "low": None, "high": None},
        "b": [None, 2.0, 3, True],
        "c": {"value": 0.5, "low": None, "high": 1},
        "d": {"value": None, "low": 0.0, "high": 1.0},
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [((1, 2.5), [1, 2.5]), ({1: None}, {"1": None}), (True, True), ([math.nan], [None]), ("text", "text")],
)
def test_plain_values(value: Any, expected: Any) -> None:
    assert plain(value) == expected


def test_numbers_of_numpy_are_numbers() -> None:
    assert plain({"a": np.float32(0.5), "b": np.int64(3), "c": np.float32("nan")}) == {"a": 0.5, "b": 3, "c": None}
    assert type(plain(np.int64(3))) is int


PLACES = [(name, key) for name in ("base", "adapter", "usage", "hardware") for key in [None, *VALID[name]]]


@pytest.mark.parametrize("odd", [None, [], {}, [1], 10**400, "NaN", True], ids=repr)
@pytest.mark.parametrize(("name", "key"), PLACES)
def test_what_is_read_can_be_shown(name: str, key: str | None, odd: Any) -> None:
    """Whatever stands in a record, it is refused by name, or the card can be written."""
    values = {**VALID, name: odd} if key is None else {**VALID, name: {**VALID[name], key: odd}}
    with contextlib.suppress(DataError):
        assert render_card(RunRecord.from_dict(values)).startswith("---")
