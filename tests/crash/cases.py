"""Which changes a run is stopped at, what a machine that loses power forgets, and what has to hold afterwards."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from alignkit.checkpoint.find import checkpoint_folders
from alignkit.checkpoint.manifest import verify
from alignkit.errors import CheckpointError
from alignkit.trainers.ppo_callbacks import SAMPLES_FILE
from tests.crash.compare import differences
from tests.crash.nursery import Nursery, Outcome
from tests.crash.shim import Change, Plan


class Case(NamedTuple):
    """A way to stop a run.

    Attributes:
        plan: at which change, and whether within a write.
        power: lose what was not brought to disk, too.
    """

    plan: Plan
    power: bool

    def __str__(self) -> str:
        return f"{self.plan.do} {self.plan.number}{' and power lost' if self.power else ''}"


def every_case(changes: Sequence[Change]) -> list[Case]:
    """Every state that a kill can leave: after each change, and within each write; and what a loss of power does then.

    Power matters where it empties more than what was being written aside, under a hidden name, which nobody reads, and
    samples of PPO, which are for people and may get lost so.
    """
    plans = [Plan("kill_after", number) for number in range(len(changes) + 1)]
    cases = [Case(plan, False) for plan in plans]
    cases += [Case(plan, True) for plan in plans if any(map(_counts, unsynced_after(changes[: plan.number])))]
    return cases + [Case(Plan("kill_within", change.number), False) for change in changes if change.is_write]


def _counts(path: str) -> bool:
    return not any(part.startswith(".") or part == SAMPLES_FILE for part in Path(path).parts)


def some_cases(changes: Sequence[Change], count: int, seed: int = 0) -> list[Case]:
    """`count` of them, always the same: the edges of what makes a checkpoint count, and others drawn evenly."""
    edges = [change.number for change in changes if change.call.startswith("rename") and "checkpoint-" in change.to]
    cases = {str(case): case for case in every_case(changes)}
    chosen = [str(Case(Plan("kill_after", number), False)) for edge in edges for number in (edge - 1, edge)]
    others = sorted(cases.keys() - set(chosen))
    chosen += random.Random(seed).sample(others, max(count - len(chosen), 0))
    return [cases[name] for name in chosen[:count]]


def unsynced_after(changes: Iterable[Change]) -> set[str]:
    """Files whose bytes, after these changes, were not brought to disk under the name that they have."""
    found: set[str] = set()
    for change in changes:
        if "rename" in change.call:
            inside = {path for path in found if path == change.path or path.startswith(f"{change.path}/")}
            found = (found - inside) | {change.to + path.removeprefix(change.path) for path in inside}
        elif change.call in {"fsync", "fdatasync"} or "unlink" in change.call:
            found.discard(change.path)
        elif "mkdir" not in change.call and change.call not in {"rmdir", "failed"}:
            found.add(change.path)
    return found


def lose_power(changes: Iterable[Change]) -> list[Path]:
    """Empty every file that was not brought to disk, as a journalling file system leaves it; return which."""
    lost = [path for path in map(Path, sorted(unsynced_after(changes))) if path.is_file()]
    for path in lost:
        os.truncate(path, 0)
    return lost


def verified(output: Path) -> list[Path]:
    """The checkpoints of an output directory that verify."""
    found = []
    for folder in checkpoint_folders(output):
        try:
            verify(folder)
        except CheckpointError:
            continue
        found.append(folder)
    return found


def first_sealed(changes: Sequence[Change]) -> int:
    """The number of the change that gave the first checkpoint its name."""
    return next(change.number for change in changes if change.call.startswith("rename") and _is_checkpoint(change.to))


def _is_checkpoint(path: str) -> bool:
    return Path(path).name.startswith("checkpoint-")


def faults(nursery: Nursery, name: str, case: Case, whole: Path, changes: Sequence[Change], output: Path) -> list[str]:
    """Kill a run, resume it, and return what differs from the one that nobody disturbed.

    Args:
        nursery: where it runs.
        name: of the run.
        case: how it is killed.
        whole: the folder of the undisturbed run.
        changes: what that one did to its files.
        output: a folder to run in; it is removed if all is well.
    """
    killed = nursery.run(name, output, plan=case.plan)
    if killed.signal == 0 and case.plan.number < len(changes):
        return [f"was not killed: {killed.error} {killed.message}"]
    if case.power:
        lose_power(killed.changes)
    found = []
    if case.plan.number >= first_sealed(changes) and not verified(output):
        found.append("no checkpoint verifies any more")
    outcome = nursery.run(name, output, resume="auto")
    found += ended_badly(outcome)
    if not found:
        remove_what_may_stay(output, whole)
        found = [line for line in differences(output, whole) if not (case.power and line.startswith(SAMPLES_FILE))]
        shutil.rmtree(output)
    return found


def remove_what_may_stay(output: Path, whole: Path) -> None:
    """Remove what a run that was killed leaves on purpose.

    That is a whole checkpoint, where the kill came between the naming of the next one and its removal, and the samples
    of a run of PPO that had no checkpoint yet, which the one that began anew put aside.
    """
    for folder in verified(output):
        if not (whole / folder.name).exists():
            shutil.rmtree(folder)
    for path in output.glob("rollouts-*.jsonl"):
        path.unlink()


def ended_badly(outcome: Outcome) -> list[str]:
    """What a run that should have ended well said, if it did not."""
    if outcome.signal or outcome.error:
        return [f"signal {outcome.signal}, {outcome.error}: {outcome.message}", outcome.said[-2000:]]
    return []
