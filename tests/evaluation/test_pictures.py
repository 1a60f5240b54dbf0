"""Curves of logs as pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from alignkit.evaluation.pictures import write_pictures
from tests.evaluation.run_records import dpo_record, hostile_record, ppo_record


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (dpo_record, ["loss", "accuracy", "margin", "rewards", "logps", "grad_norm"]),
        (ppo_record, ["reward", "kl", "frontier", "length", "endings"]),
        (hostile_record, ["reward", "kl", "frontier"]),
    ],
)
def test_a_record_is_drawn_panel_by_panel(make, names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    paths = write_pictures(make(), tmp_path / "new")
    assert paths == [tmp_path / "new" / f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("name", ["$x^$", "_hidden", "数据", "a\\b", "%s{}"])
def test_a_name_is_no_mathematics(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    log = [{"step": 1, "loss": 0.7}, {"step": 1, f"eval_{name}_loss": 0.6, f"eval_{name}_runtime": 1.0}]
    (path,) = write_pictures(dpo_record(log=log), tmp_path)
    assert path.name == "loss.png"


def test_an_empty_log_makes_no_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert write_pictures(dpo_record(log=[]), tmp_path / "none") == []
    assert [record.message for record in caplog.records] == ["No picture of the run: the log holds none."]
    assert not (tmp_path / "none").exists()


def test_without_matplotlib_no_pictures_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert write_pictures(dpo_record(), tmp_path) == []
    assert [record.message for record in caplog.records] == [
        'No picture of the run: matplotlib is missing (pip install "alignkit[plot]").'
    ]
