"""Two processes resume as one does, weights copied or sharded: each finds its random numbers and open windows again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.resume import sharded_run, two_process_run
from tests.two_processes import launch_copied, launch_sharded

pytestmark = pytest.mark.slow  # Python processes that import torch and transformers

CASES = {
    "preferences": ("sigmoid", "synced adapter", "synced model", "kto"),
    "evaluations and rollouts": ("best at the end", "rewards", "adaptive kl", "rollouts cut short"),
}

SHARDED = ("sigmoid", "synced adapter", "best at the end", "rewards", "evaluated before")


@pytest.mark.parametrize("group", CASES)
def test_every_step_in_two_processes(group: str, tmp_path: Path) -> None:
    launch_copied(two_process_run, str(tmp_path), *CASES[group], cache=tmp_path)
    check(tmp_path, CASES[group])


def test_every_step_with_sharded_weights(tmp_path: Path) -> None:
    launch_sharded(sharded_run, str(tmp_path), *SHARDED, cache=tmp_path)
    # torch gives the two numbers of a sharded optimizer's `betas` back as a list.
    check(tmp_path, SHARDED, but="['betas'] is list, not tuple")


def check(folder: Path, cases: tuple[str, ...], *, but: str | None = None) -> None:
    """Nothing differs, but lines that end so."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert tuple(results) == cases
    for name, result in results.items():
        assert [line for line in result["differences"] if but is None or not line.endswith(but)] == [], name
        assert result["steps"] >= 2, name
