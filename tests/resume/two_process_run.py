"""Resumes of runs in two processes: `python -m torch.distributed.run ... -m <this module> FOLDER CASE...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import disable_progress_bars

from tests.resume.cases import CASES
from tests.resume.every_step import every_step


def main(folder: Path, names: list[str]) -> None:
    """Resume every case at every step, with and without accumulation; the first process writes what differs."""
    disable_progress_bars()
    torch.set_num_threads(1)
    results = {}
    for number, name in enumerate(names):
        accumulation = 1 + number % 2
        steps, mine = every_step(CASES[name], folder / str(number), accumulation, 0, processes=2)
        found: list[list[str]] = [[], []]
        torch.distributed.all_gather_object(found, mine)
        results[name] = {"steps": steps, "differences": [line for lines in found for line in lines]}
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
