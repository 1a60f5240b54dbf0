"""One run undisturbed, and one that begins anew from each of its checkpoints: what differs."""

from __future__ import annotations

import gc
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Trainer

from alignkit.checkpoint.find import checkpoint_folders
from tests.crash.compare import MEASURED, differences, unequal
from tests.resume.cases import Case


class Whole(NamedTuple):
    """An undisturbed run.

    Attributes:
        folder: what it left.
        kept: copies of all its checkpoints.
        present: names of the checkpoints that its limits left after each save, by step.
        end: of `end_of`.
    """

    folder: Path
    kept: Path
    present: dict[int, list[str]]
    end: dict[str, Any]


def end_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that a trainer holds once it has trained, without clock, throughput and memory."""
    state: Any = trainer.state
    log = [{name: value for name, value in entry.items() if not name.endswith(MEASURED)} for entry in state.log_history]
    optimizer: Any = trainer.optimizer
    states: dict[str, Any] = trainer.states.state_dict()  # type: ignore[attr-defined]
    states.get("ppo", {}).get("window", {}).pop("completions/tokens_per_second", None)
    return {
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "log": log,
        "step": (state.global_step, state.epoch, state.total_flos),
        "best": (state.best_metric, state.best_global_step),
        "states": states,
        "random": (random.getstate(), torch.get_rng_state(), np.random.get_state()[1:]),  # noqa: NPY002
    }


class KeepsAll:
    """Copies every checkpoint of a run, and notes which its limits left."""

    def __init__(self, trainer: Any, kept: Path) -> None:
        self._let_go, self._kept = trainer._let_go, kept
        self.present: dict[int, list[str]] = {}
        trainer._let_go = self

    def __call__(self, target: Path) -> None:
        """Let others go once `target` is there, as the trainer would."""
        shutil.copytree(target, self._kept / target.name, dirs_exist_ok=True)
        self._let_go(target)
        self.present[step_of(target)] = [path.name for path in checkpoint_folders(target.parent)]


def step_of(checkpoint: Path | str) -> int:
    """The step in a checkpoint's name."""
    return int(str(checkpoint).rpartition("-")[2])


def run_whole(case: Case, folder: Path, accumulation: int, workers: int, processes: int = 1) -> Whole:
    """Train without a break."""
    with case.context():
        trainer = case.trainer(folder / "whole", accumulation, workers, processes)
        keeper = KeepsAll(trainer, folder / "kept")
        trainer.train()
        whole = Whole(folder / "whole", folder / "kept", keeper.present, end_of(trainer))
    if processes > 1:  # the first process alone saves
        present: list[Any] = [whole.present]
        torch.distributed.broadcast_object_list(present)
        whole = whole._replace(present=present[0])
    return whole


def resume_at(
    case: Case,
    whole: Whole,
    step: int,
    folder: Path,
    accumulation: int,
    workers: int,
    processes: int = 1,
    *,
    spoil: Callable[[Path], None] = lambda checkpoint: None,
    change: Callable[[Any], None] = lambda trainer: None,
) -> list[str]:
    """Go on in a new folder from what an undisturbed run had there at `step`, and say what differs at the end.

    Args:
        case, accumulation, workers, processes: of that run.
        whole: what it left.
        step: at which a checkpoint was saved.
        folder: the new one.
        spoil: what is done to the checkpoint first.
        change: what is done to the trainer.
    """
    is_main = processes == 1 or torch.distributed.get_rank() == 0
    if is_main:
        _furnish(whole, step, folder)
        spoil(folder / f"checkpoint-{step}")
    if processes > 1:
        torch.distributed.barrier()
    random.seed(step)  # a resume takes nothing from what the process was before
    torch.manual_seed(step)
    with case.context():
        trainer = case.trainer(folder, accumulation, workers, processes)
        change(trainer)
        trainer.train(resume_from_checkpoint=True)
        found = list(unequal(end_of(trainer), whole.end, "at the end: "))
    if is_main:
        found += [line for line in differences(folder, whole.folder) if not _may_differ(line, step)]
    return found


def _may_differ(line: str, step: int) -> bool:
    """Whether a difference is the path of another run in a checkpoint that was put there, or measured."""
    name = line.partition("/")[0]
    was_there = name.startswith("checkpoint-") and step_of(name) <= step
    return (was_there and "best_model_checkpoint" in line) or "tokens_per_second" in line


def _furnish(whole: Whole, step: int, folder: Path) -> None:
    """Put down what lies in the output directory at a step: its checkpoint, the best one, and the files beside them."""
    folder.mkdir(parents=True)
    for path in whole.folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    for name in whole.present[step]:
        shutil.copytree(whole.kept / name, folder / name)


def every_step(case: Case, folder: Path, accumulation: int, workers: int, processes: int = 1) -> tuple[int, list[str]]:
    """Resume from every checkpoint of a run.

    Returns:
        How many times, and what differs, each line with its step.
    """
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()  # accelerate collects garbage at the start of every training, which takes longer than a step here
    try:
        whole = run_whole(case, folder, accumulation, workers, processes)
        found = []
        for step in whole.present:
            lines = resume_at(case, whole, step, folder / f"from-{step}", accumulation, workers, processes)
            found += [f"from step {step}: {line}" for line in lines]
    finally:
        gc.unfreeze()
        logging.disable(logging.NOTSET)
    return len(whole.present), found
