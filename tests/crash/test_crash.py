"""SIGKILL at any change of any file, and the run that resumes is bit for bit the one that nobody disturbed."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from alignkit.checkpoint.atomic import REMOVED, REPLACED, STAGED, tidy
from alignkit.checkpoint.find import newest_verified
from tests.crash.cases import (
    Case,
    every_case,
    faults,
    first_sealed,
    lose_power,
    remove_what_may_stay,
    some_cases,
    unsynced_after,
    verified,
)
from tests.crash.compare import differences
from tests.crash.nursery import Nursery
from tests.crash.runs import RUNS, SAVED
from tests.crash.shim import Change, Plan

# How many cases of each run a short test takes; a case takes about a second. A slow test takes all.
FEW = {"reward": 24, "kto": 12, "dpo": 12, "ppo": 14}


class Whole(NamedTuple):
    """A run that nobody disturbed."""

    folder: Path
    changes: list[Change]


@pytest.fixture(scope="module", params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    """A run's name; tests come grouped by it, so that each runs undisturbed once."""
    return request.param


@pytest.fixture(scope="module")
def whole(nursery: Nursery, name: str, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The undisturbed run of that name."""
    folder = tmp_path_factory.mktemp(name) / "whole"
    outcome = nursery.run(name, folder)
    assert outcome.error == "", outcome.said
    return Whole(folder, outcome.changes)


def check(nursery: Nursery, name: str, whole: Whole, cases: list[Case], folder: Path) -> None:
    """Run all the cases and report every one that fails."""
    started = time.monotonic()
    found = {
        str(case): lines
        for number, case in enumerate(cases)
        if (lines := faults(nursery, name, case, *whole, folder / str(number)))
    }
    seconds = (time.monotonic() - started) / len(cases)
    print(f"{name}: killed {len(cases)} times in {len(whole.changes)} changes of files, {seconds:.2f} s each")
    said = [f"{case}: {line}" for case, lines in found.items() for line in lines[:3]]
    assert not found, f"{len(found)} of {len(cases)} cases differ:\n" + "\n".join(said[:40])


def test_some_kills_are_survived(nursery: Nursery, name: str, whole: Whole, tmp_path: Path):
    check(nursery, name, whole, some_cases(whole.changes, FEW[name]), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kill_is_survived(nursery: Nursery, name: str, whole: Whole, tmp_path: Path):
    cases = every_case(whole.changes)
    assert len({case.plan for case in cases if case.plan.do == "kill_after"}) == len(whole.changes) + 1
    check(nursery, name, whole, cases, tmp_path)


def test_a_checkpoint_is_on_disk_before_it_counts(whole: Whole):
    """What a loss of power would empty is never in a folder that is named like a checkpoint."""
    for number in range(first_sealed(whole.changes), len(whole.changes) + 1):
        unsynced = unsynced_after(whole.changes[:number])
        assert not [path for path in unsynced if "/checkpoint-" in path], whole.changes[number - 1]


def test_an_old_checkpoint_goes_when_the_new_one_is_on_disk(whole: Whole):
    old, new = (str(whole.folder / f"checkpoint-{step}") for step in SAVED)
    named = next(change.number for change in whole.changes if change.to == new)
    gone = next(change.number for change in whole.changes if old in change.path and change.number > named)
    between = whole.changes[named : gone - 1]
    assert [change.path for change in between if change.call == "fsync"] == [str(whole.folder)]
    assert not [change for change in whole.changes[:named] if change.path == old and change.call != "fsync"]


def test_losing_power_empties_what_was_not_synced(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("text")
    calls = [("openat", "d/x", ""), ("write", "d/x", ""), ("fsync", "d/x", ""), ("write", "d/y", "")]
    calls += [("write", "c", ""), ("rename", "d", "e"), ("write", "b", ""), ("unlink", "gone", "")]
    changes = [Change(i, call, str(tmp_path / path), str(tmp_path / to), 4) for i, (call, path, to) in enumerate(calls)]
    (tmp_path / "e").mkdir()
    for name in ("x", "y"):
        (tmp_path / "e" / name).write_text("text")
    assert lose_power(changes) == [tmp_path / "b", tmp_path / "c", tmp_path / "e" / "y"]
    assert [(tmp_path / name).stat().st_size for name in ("a", "b", "c", "e/x", "e/y")] == [4, 0, 0, 4, 0]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_checkpoints_of_an_earlier_run_are_replaced_without_a_gap(nursery: Nursery, tmp_path: Path, every: bool):
    """A new run in a used folder gives its checkpoints names that are taken; one of them is always whole."""
    used, output = tmp_path / "used", tmp_path / "output"
    assert nursery.run("reward", used, save_total_limit=2).error == ""
    assert [path.name for path in verified(used)] == [f"checkpoint-{step}" for step in SAVED]
    shutil.copytree(used, output)
    changes = nursery.run("reward", output, save_total_limit=2, seed=1).changes
    replacing = [c.number for c in changes if f"/{REPLACED}checkpoint-" in c.path + c.to and c.call.startswith("ren")]
    assert len(replacing) == 2
    numbers = range(1, len(changes) + 1) if every else sorted({n + k for n in replacing for k in (-1, 0, 1, 2)})
    for number in numbers:
        shutil.rmtree(output)
        shutil.copytree(used, output)
        outcome = nursery.run("reward", output, plan=Plan("kill_after", number), save_total_limit=2, seed=1)
        assert outcome.signal == signal.SIGKILL
        tidy(output)  # what a resume begins with
        assert len(verified(output)) >= 1, number
        found = newest_verified(output).folder
        assert found is not None, number
        assert [path.name for path in output.iterdir() if path.name.startswith((STAGED, REPLACED, REMOVED))] == []
    print(f"replacing checkpoints: killed {len(numbers)} times in {len(changes)} changes of files")


def test_a_run_is_killed_again_and_again(nursery: Nursery, name: str, whole: Whole, tmp_path: Path):
    """Each resume gets a little further, whatever it was in the middle of."""
    output, kills = tmp_path / "output", 0
    while (outcome := nursery.run(name, output, resume="auto", plan=Plan("kill_after", 45 + 10 * kills))).signal:
        kills += 1
        assert kills < 20
    assert outcome.error == "", outcome.said
    remove_what_may_stay(output, whole.folder)
    assert differences(output, whole.folder) == []
    assert kills >= 2
