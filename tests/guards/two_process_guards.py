"""Runs of two processes: `python -m torch.distributed.run ... -m tests.guards.two_process_guards FOLDER`.

In the second step a number of the second process alone is not finite.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars

from tests.guards.guarded_runs import (
    TRAINERS,
    Watch,
    equal,
    make_trainer,
    poison_tokens,
    rows,
    spoil_loss,
)


def skipped_together(kind: str, folder: Path, rank: int) -> dict[str, Any]:
    """Spoil the numbers of the second process in step 2; say what this one has made of it."""
    watch = Watch()
    steps = (2,) if rank else ()
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    if kind == "ppo":
        trainer = make_trainer(
            kind, folder, [watch], classes={kind: spoil_loss(TRAINERS[kind], watch, steps, math.nan)}, **options
        )
    else:
        # Processes take micro-batches in turn: rows 10 and 11 are in the first micro-batch of the second process.
        data = rows(24, labelled=kind == "kto", poisoned=(11,))
        trainer = make_trainer(kind, folder, [watch], train_dataset=data, **options)
        poison_tokens(trainer.bundle.base, lambda: watch.step in steps)
    trainer.train()
    after = torch.cat([weight.flatten() for weight in watch.after[3][0].values()])
    everyone = trainer.accelerator.gather(after[None])
    return {
        "skipped": [[each.step, each.rows] for each in trainer.guard.skipped],
        "stays": equal(watch.before[2], watch.after[2]) and set(watch.gradients[2].values()) == {None},
        "moves": not equal(watch.before[3], watch.after[3]),
        "agrees": bool((everyone == everyone[0]).all()),
    }


def main(folder: Path) -> None:
    """Run every scenario; each process leaves what it saw in FOLDER."""
    disable_progress_bars()
    torch.set_num_threads(1)
    rank = PartialState(cpu=True).process_index
    found = {kind: skipped_together(kind, folder / kind, rank) for kind in ("dpo", "reward", "ppo")}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
