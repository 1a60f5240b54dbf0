"""Hundreds of steps, killed every few seconds: the end is that of a run that nobody disturbed, which holds no more."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from tests.crash.compare import differences
from tests.soak import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WARM_STEPS = 150  # caches and allocators are full by then
MAX_GROWTH_BYTES = 16 * 2**20
LIVES = (0.1, 0.35)  # how long a process lives, as a share of what the undisturbed run took
MOST_KILLS = 30


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that are forked from one that has only imported what they need."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([runs.__name__])
    first = found.Process(target=int)  # waits for the imports, which no run's time shall hold
    first.start()
    first.join()
    return found


def tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-3000:] if path.exists() else ""


@pytest.mark.parametrize("name", runs.RUNS)
def test_kills_every_few_seconds_change_nothing(
    name: str, context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    said, figures = tmp_path / "said.txt", tmp_path / "figures.json"
    alone = context.Process(target=runs.train, args=(name, tmp_path / "whole", said, figures))
    started = time.monotonic()
    alone.start()
    alone.join()
    seconds = time.monotonic() - started
    assert alone.exitcode == 0, tail(said)

    source, kills, codes = random.Random(name), 0, []
    while codes[-1:] != [0]:
        process = context.Process(target=runs.train, args=(name, tmp_path / "killed", said, None))
        process.start()
        process.join(None if kills == MOST_KILLS else seconds * source.uniform(*LIVES))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        codes.append(process.exitcode)
        assert codes[-1] in (0, -signal.SIGKILL), tail(said)
    held = json.loads(figures.read_text(encoding="utf-8"))
    with capsys.disabled():
        print(f"\n{name}: {runs.STEPS} steps in {seconds:.0f} s, {kills} kills; {growth(held)}")
    assert differences(tmp_path / "killed", tmp_path / "whole") == []
    assert kills >= 3
    check_growth(held)


def growth(held: list[dict[str, int]]) -> str:
    """What a run held, for people."""
    warm, last = next(row for row in held if row["step"] >= WARM_STEPS), held[-1]
    return (
        f"undisturbed: {warm['bytes'] / 2**20:.1f} MiB and {warm['files']} open files at step {warm['step']}, "
        f"{last['bytes'] / 2**20:.1f} MiB and {last['files']} at step {last['step']}"
    )


def check_growth(held: list[dict[str, int]]) -> None:
    """Once warm, no file stays open, and the memory of the last steps is that of the first."""
    warm = [row for row in held if row["step"] >= WARM_STEPS]
    count = len(warm) // 4
    first, last = (statistics.median(row["bytes"] for row in part) for part in (warm[:count], warm[-count:]))
    assert last - first < MAX_GROWTH_BYTES
    assert max(row["files"] for row in warm[count:]) <= max(row["files"] for row in warm[:count])


@pytest.mark.parametrize("grows", ["bytes", "files"])
def test_growth_would_be_seen(grows: str) -> None:
    """A hundredth of a file, or 100 kB, for each step."""
    rate = {"bytes": 100_000, "files": 0.01}[grows]
    even = [{"step": step, "bytes": 10**9, "files": 40} for step in range(10, runs.STEPS + 1, 10)]
    check_growth(even)
    growing = [{**row, grows: row[grows] + int(rate * row["step"])} for row in even]
    with pytest.raises(AssertionError):
        check_growth(growing)
