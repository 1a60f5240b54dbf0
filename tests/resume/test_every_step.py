"""From each checkpoint of a run, a new trainer goes on to the end, bit for bit as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from safetensors import safe_open

from alignkit.checkpoint.manifest import MANIFEST, read_manifest, seal
from alignkit.checkpoint.states import read_states, write_states
from tests.resume.cases import CASES, PPO, QUICK, Case
from tests.resume.every_step import Whole, every_step, resume_at, run_whole

MEMORY = Path("/dev/shm")  # where there is such a thing, bringing files to disk takes no time


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own, in memory if possible; what `datasets` caches lies there too."""
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as name:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(name) / "datasets")
        yield Path(name)


@pytest.mark.parametrize("name", QUICK)
def test_every_option_once(name: str, folder: Path) -> None:
    case, accumulation, workers = QUICK[name]
    steps, found = every_step(case, folder, accumulation, workers)
    assert found == []
    assert steps >= 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_every_case(name: str, accumulation: int, workers: int, folder: Path) -> None:
    if name in PPO and workers:
        pytest.skip("rollouts are drawn by row number; no worker loads them")
    steps, found = every_step(CASES[name], folder, accumulation, workers)
    assert found == []
    assert steps >= 2


# --- controls: what is not restored would be seen ---


def stale_parts(whole: Whole, early: int, late: int) -> dict[str, Callable[[Path], None]]:
    """By name, ways to put one part of an earlier checkpoint into a later one: each file, and each registered state."""
    old, new = (whole.kept / f"checkpoint-{step}" for step in (early, late))
    found: dict[str, Callable[[Path], None]] = {}
    for name in read_manifest(new).files:
        if not name.endswith((".json", "README.md")) and (old / name).read_bytes() != (new / name).read_bytes():
            if name.startswith("states_"):
                found |= {f"{name}: {part}": put for part, put in _stale_states(old, new, name)}
            else:
                found[name] = _replacing(old / name, name)
    return found


def _replacing(source: Path, name: str) -> Callable[[Path], None]:
    def put(checkpoint: Path) -> None:
        shutil.copy(source, checkpoint / name)

    return put


def _stale_states(old: Path, new: Path, name: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    before, after = read_states(old / name), read_states(new / name)
    for part in ("loss", "total_loss", "last_logged_step"):
        if before["trainer"][part] != after["trainer"][part]:
            yield part, _setting(name, ("trainer", part), before["trainer"][part])
    for part in after["states"]:
        if str(before["states"][part]) != str(after["states"][part]):
            yield part, _setting(name, ("states", part), before["states"][part])


def _setting(name: str, place: tuple[str, str], value: Any) -> Callable[[Path], None]:
    def put(checkpoint: Path) -> None:
        states = read_states(checkpoint / name)
        states[place[0]][place[1]] = value
        write_states(checkpoint / name, states)

    return put


def sealed_again(put: Callable[[Path], None]) -> Callable[[Path], None]:
    """Change a checkpoint so that only what it makes of the run can tell."""

    def spoil(checkpoint: Path) -> None:
        manifest = read_manifest(checkpoint)
        (checkpoint / MANIFEST).unlink()
        put(checkpoint)
        seal(checkpoint, sequence=manifest.sequence, step=manifest.step, run=manifest.run)

    return spoil


def check_controls(case: Case, folder: Path, accumulation: int, early: int, late: int) -> set[str]:
    """Every stale part makes a difference, and the checkpoint as it was makes none; return the parts' names."""
    whole = run_whole(case, folder, accumulation, 0)
    assert resume_at(case, whole, late, folder / "as it was", accumulation, 0, spoil=sealed_again(lambda _: None)) == []
    parts = stale_parts(whole, early, late)
    unseen = [
        name
        for number, (name, put) in enumerate(parts.items())
        if not resume_at(case, whole, late, folder / str(number), accumulation, 0, spoil=sealed_again(put))
    ]
    assert unseen == []
    return set(parts)


def test_a_stale_part_of_a_dpo_checkpoint_shows(folder: Path) -> None:
    case = CASES["synced adapter"]
    parts = check_controls(case, folder, 1, 1, 3)
    assert parts == {
        "adapter_model.safetensors",
        "reference/adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "states_0.safetensors: loss",
        "states_0.safetensors: window/train",
    }


def test_a_stale_part_of_a_ppo_checkpoint_shows(folder: Path) -> None:
    case = Case(CASES["adaptive kl"].make, {**CASES["adaptive kl"].options, "value_adapter": True})
    parts = check_controls(case, folder, 1, 2, 6)
    assert {
        "adapter_model.safetensors",
        "value/adapter_model.safetensors",
        "value_head.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "states_0.safetensors: ppo",
    } <= parts


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["synced model", "kto", "rewards", "scaled gradients", "stopped early", "logged by epoch"]
)
def test_a_stale_part_of_any_checkpoint_shows(name: str, folder: Path) -> None:
    parts = check_controls(CASES[name], folder, 1, 1, 2)
    drawn = set() if name == "synced model" else {"rng_state.pth"}  # without adapters there is no dropout
    assert {"optimizer.pt", "scheduler.pt", *drawn} <= parts


def test_another_order_of_the_rows_shows(folder: Path) -> None:
    """The seed of the order is changed behind the trainer's back: it would refuse an option that says so."""
    case = CASES["sigmoid"]
    whole = run_whole(case, folder, 1, 0)

    def reorder(trainer: Any) -> None:
        trainer.args.data_seed = 7
        trainer.accelerator.dataloader_config.data_seed = 7

    found = resume_at(case, whole, 2, folder / "again", 1, 0, change=reorder)
    assert any("adapter_model.safetensors" in line for line in found)
    log = json.loads((whole.folder / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in log] == [4]  # most checkpoints hold an open window
    with safe_open(whole.folder / "checkpoint-6" / "states_0.safetensors", "pt") as file:
        assert file.keys()
