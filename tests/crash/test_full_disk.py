"""A disk that is full or broken stops a save, and takes nothing with it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignkit.checkpoint.atomic import REMOVED, REPLACED, STAGED
from tests.crash.cases import ended_badly, first_sealed, remove_what_may_stay, verified
from tests.crash.compare import differences
from tests.crash.nursery import Nursery, Outcome
from tests.crash.runs import RUNS, SAVED
from tests.crash.shim import Change, Plan

FULL, BROKEN = "fail_from", "fail_once"
FEW = {"reward": 4, "kto": 4, "dpo": 5, "ppo": 6}
# Where libraries, and what runs beside a save, tell of trouble each in its own way.
EDGES = (
    r"write .*/\.tmp",  # safetensors
    "write .*/tokenizer.json",  # tokenizers
    "write .*/optimizer.pt",  # torch
    "write .*/manifest.json",
    "fsync .*/optimizer.pt",
    "rename .*/checkpoint-2$",
    r"fsync \S+/whole $",
    r"rename .*/\.removing-",  # the old one goes
    r"unlinkat .*/\.removing-",
    r"openat .*/\.run_record",
)


@pytest.fixture(scope="module", params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    """A run's name."""
    return request.param


@pytest.fixture(scope="module")
def whole(nursery: Nursery, name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Change]]:
    """An undisturbed run, and what it did."""
    folder = tmp_path_factory.mktemp(name) / "whole"
    outcome = nursery.run(name, folder)
    assert outcome.error == "", outcome.said
    return folder, outcome.changes


def faults(nursery: Nursery, name: str, plan: Plan, whole: tuple[Path, list[Change]], output: Path) -> list[str]:
    """Let a call fail, then run on without that; return what was not as it should be."""
    folder, changes = whole
    outcome = nursery.run(name, output, plan=plan)
    failed = [change for change in outcome.changes if change.call == "failed"]
    if not failed:
        return [] if plan.do == FULL else ["nothing failed"]
    found = bad_end(outcome, output)
    if plan.number > first_sealed(changes) and not verified(output):
        found.append("no checkpoint verifies any more")
    remove_what_may_stay(output, folder)
    if not outcome.error and differences(output, folder) and "could not be" not in outcome.said:
        found.append("something is missing, and nothing was said of it")
    if plan.do == FULL and (left := leftovers(output)):
        found.append(f"{left} stay")
    found += ended_badly(nursery.run(name, output, resume="auto"))
    remove_what_may_stay(output, folder)
    lost = "Samples of rollout" in outcome.said  # which was said, and happens to nothing else
    found += [line for line in differences(output, folder) if not (lost and line.startswith("rollouts.jsonl"))]
    shutil.rmtree(output)
    return found


def bad_end(outcome: Outcome, output: Path) -> list[str]:
    """What is wrong with how a run on a bad disk ended: it goes on if it can, and says what to do if not."""
    if outcome.signal:
        return [f"signal {outcome.signal}", outcome.said[-1000:]]
    if outcome.error and outcome.error != "CheckpointError":
        where = [line.strip() for line in outcome.said.splitlines() if "/alignkit/" in line]
        return [f"{outcome.error}: {outcome.message}", *where[-3:]]
    if outcome.error and str(output) not in outcome.message:
        return [f"the message does not say where: {outcome.message}"]
    return []


def leftovers(output: Path) -> list[str]:
    """Folders that were being written, replaced or removed."""
    present = output.iterdir() if output.is_dir() else ()  # the folder itself may not have been made
    return [path.name for path in present if path.name.startswith((STAGED, REPLACED, REMOVED))]


def check(nursery: Nursery, name: str, whole: tuple[Path, list[Change]], numbers: list[int], folder: Path) -> None:
    started = time.monotonic()
    plans = [Plan(do, number, error) for number in numbers for do, error in ((FULL, errno.ENOSPC), (BROKEN, errno.EIO))]
    found = {
        plan: lines for i, plan in enumerate(plans) if (lines := faults(nursery, name, plan, whole, folder / str(i)))
    }
    seconds = (time.monotonic() - started) / len(plans)
    print(f"{name}: {len(plans)} full or broken disks, {seconds:.2f} s each")
    said = [
        f"{plan.do} {plan.number} ({at(whole[1], plan)}): {line}" for plan, lines in found.items() for line in lines
    ]
    assert not found, f"{len(found)} of {len(plans)}:\n" + "\n".join(said[:60])


def at(changes: list[Change], plan: Plan) -> str:
    change = changes[plan.number - 1]
    return f"{change.call} {Path(change.path).parent.name}/{Path(change.path).name}"


def test_some_failing_calls_are_survived(nursery: Nursery, name: str, whole: tuple[Path, list[Change]], tmp_path: Path):
    changes = whole[1]
    edges = {edge: next(c.number for c in changes if re.search(edge, f"{c.call} {c.path} {c.to}")) for edge in EDGES}
    numbers = {1 + (2 * i + 1) * len(changes) // (2 * FEW[name]) for i in range(FEW[name])}
    numbers |= set(edges.values()) if name == "reward" else set()
    numbers |= {next(c.number for c in changes if c.is_write and "rollouts" in c.path)} if name == "ppo" else set()
    check(nursery, name, whole, sorted(numbers), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_failing_call_is_survived(nursery: Nursery, name: str, whole: tuple[Path, list[Change]], tmp_path: Path):
    check(nursery, name, whole, list(range(1, len(whole[1]) + 1)), tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_told_of_before_training(nursery: Nursery, small_disk: Path):
    (small_disk / "other").write_bytes(bytes(24 * 2**20))
    outcome = nursery.run("dpo", small_disk / "run")
    assert outcome.error == "CheckpointError"
    assert re.search(
        r"a checkpoint takes 3\d\.\d MB, and 2\d\.\d MB are free .*: \d\.\d MB are missing", outcome.message
    )
    assert "step 3/" not in outcome.said
    assert verified(small_disk / "run") == []
    (small_disk / "other").unlink()
    assert nursery.run("dpo", small_disk / "run", resume="auto").error == ""
    assert [path.name for path in verified(small_disk / "run")] == [f"checkpoint-{SAVED[-1]}"]
