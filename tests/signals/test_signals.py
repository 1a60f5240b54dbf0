"""SIGTERM and SIGINT in every phase of a run: what was trained is kept, the code says so, and going on is exact."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from alignkit.checkpoint.find import checkpoint_folders, newest_verified
from alignkit.trainers.signals import EXIT_RESUMABLE
from tests.crash.compare import differences
from tests.signals import run as runs

LAST = f"checkpoint-{runs.LAST_STEP}"
SECONDS = 60


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that are forked from one that has imported everything and computed nothing."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([runs.__name__])
    context.Process(target=int).start()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


def finish(processes: Any, *arguments: Any) -> int:
    """Run to the end; the exit code."""
    process = processes.Process(target=runs.run, args=arguments)
    process.start()
    process.join(SECONDS)
    assert not process.is_alive(), process.kill()
    return process.exitcode


def interrupt(processes: Any, method: str, folder: Path, phase: str, *numbers: int) -> tuple[int, float]:
    """Run until the phase is reached, send the signals; the exit code, and the seconds that it took to end."""
    sign = folder.with_suffix(".sign")
    process = processes.Process(target=runs.run, args=(method, folder, phase, sign))
    process.start()
    until = time.monotonic() + SECONDS
    while not sign.exists():
        assert process.is_alive(), f"ended with {process.exitcode} before {phase}"
        assert time.monotonic() < until, f"never came to {phase}"
        time.sleep(0.01)
    started = time.monotonic()
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(0.2)
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail(f"{phase}: the signal was not heard")
    return process.exitcode, time.monotonic() - started


@pytest.fixture(scope="module")
def undisturbed(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for method in ("dpo", "reward", "ppo"):
        found[method] = tmp_path_factory.mktemp("undisturbed") / method
        assert finish(processes, method, found[method]) == 0
    return found


TRAINING = [
    *(("dpo", phase) for phase in ("forward", "between micro-batches", "evaluation", "saving")),
    *(("reward", phase) for phase in ("forward", "evaluation", "saving")),
    *(("ppo", phase) for phase in ("rollout", "reward call", "minibatch", "evaluation", "saving")),
]


# Steps that are kept: those before the open one, or before the open rollout, whose boundaries are multiples of 2.
STEPS = {
    ("dpo", "forward"): 5,
    ("dpo", "between micro-batches"): 5,
    ("reward", "forward"): 5,
    ("dpo", "evaluation"): 4,
    ("dpo", "saving"): 4,
    ("ppo", "reward call"): 2,
    ("ppo", "rollout"): 4,
    ("ppo", "minibatch"): 4,
    ("ppo", "evaluation"): 4,
    ("ppo", "saving"): 2,
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(("method", "phase"), TRAINING, ids=lambda value: value)
def test_a_signal_in_training_loses_nothing(
    method: str, phase: str, number: int, processes: Any, undisturbed: dict[str, Path], tmp_path: Path
):
    folder = tmp_path / "run"
    code, seconds = interrupt(processes, method, folder, phase, number)
    assert code == EXIT_RESUMABLE
    assert seconds < 20
    kept = newest_verified(folder)
    assert kept.folder is not None
    assert not kept.skipped
    if (method, phase) in STEPS:
        assert kept.folder.name == f"checkpoint-{STEPS[method, phase]}"
    assert finish(processes, method, folder) == 0
    assert differences(folder / LAST, undisturbed[method] / LAST) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("phase", ["start", "data preparation", "reference caching"])
def test_a_signal_before_training_leaves_what_was_there(
    phase: str, number: int, processes: Any, undisturbed: dict[str, Path], tmp_path: Path
):
    folder = tmp_path / "run"
    assert interrupt(processes, "dpo", folder, "between micro-batches", signal.SIGTERM)[0] == EXIT_RESUMABLE
    folder.with_suffix(".sign").unlink()
    for path in (folder / "cache").iterdir():
        path.unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, seconds = interrupt(processes, "dpo", folder, phase, number)
    assert code not in (0, EXIT_RESUMABLE)
    assert seconds < 20
    assert {path: path.read_bytes() for path in before} == before
    assert finish(processes, "dpo", folder) == 0
    assert differences(folder / LAST, undisturbed["dpo"] / LAST) == []


def test_a_second_sigint_stops_at_once(processes: Any, tmp_path: Path):
    folder = tmp_path / "run"
    code, _ = interrupt(processes, "dpo", folder, "saving", signal.SIGINT, signal.SIGINT)
    assert code not in (0, EXIT_RESUMABLE)
    assert checkpoint_folders(folder) == []


def test_another_run_would_be_seen(processes: Any, undisturbed: dict[str, Path], tmp_path: Path):
    assert finish(processes, "reward", tmp_path / "run") == 0
    assert differences(tmp_path / "run" / LAST, undisturbed["dpo"] / LAST) != []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_data_workers_too(name: str, tmp_path: Path) -> None:
    """Ctrl-C reaches a whole group of processes. A worker that died of it would stop the save."""
    command = [sys.executable, "-m", "tests.signals.group", str(tmp_path / "run"), name]
    found = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=3 * SECONDS)
    assert found.returncode == EXIT_RESUMABLE, found.stderr
    assert "Traceback" not in found.stderr
    folder = newest_verified(tmp_path / "run").folder
    assert folder is not None
    assert folder.name == "checkpoint-3"
