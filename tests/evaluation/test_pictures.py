"""Curves of logs as pictures."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from alignkit.evaluation.pictures import margin_curve, rollout_curves, write_pictures
from tests.evaluation.run_records import dpo_record, hostile_record, ppo_record

ROLLOUTS = [
    {"step": 4, "episode": 16, "objective/scores": 0.1, "objective/kl": 0.0},
    {"step": 8, "episode": 32, "objective/scores": 0.3, "objective/kl": 0.4},
    {"step": 8, "train_loss": 1.0},
]


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    log = [
        {"step": 1, "rewards/margins": 0.1},
        {"step": 2, "eval_rewards/margins": 0.2},
        {"step": 2, "train_loss": 1.0},
    ]
    path = margin_curve(log, tmp_path / "margin.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_margin_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert margin_curve([{"step": 1, "loss": 0.5}], tmp_path / "margin.png") is None
    assert "the log holds none" in caplog.text


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert margin_curve([{"step": 1, "rewards/margins": 0.1}], tmp_path / "margin.png") is None
    assert [record.message for record in caplog.records] == [
        'No picture of the margin: matplotlib is missing (pip install "alignkit[plot]").'
    ]


@pytest.mark.parametrize("runs", [{"training": ROLLOUTS}, {"seed 1": ROLLOUTS, "seed 2": ROLLOUTS[:1], "empty": []}])
def test_rollouts_are_a_picture(runs, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="the extra `plot` is not installed")
    path = rollout_curves(runs, tmp_path / "rollouts.png")
    assert path is not None
    height, width, _ = image.imread(path).shape
    assert width > 4 * height  # three panels side by side


def test_no_rollouts_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert rollout_curves({"training": [{"step": 1, "loss": 0.5}]}, tmp_path / "rollouts.png") is None
    assert "the log holds none" in caplog.text


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
    assert rollout_curves({name: ROLLOUTS}, tmp_path / "rollouts.png") is not None


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
    assert len(caplog.records) == 1
    assert "alignkit[plot]" in caplog.text
