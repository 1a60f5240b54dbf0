"""Two processes over gloo resume as one does: each finds its own random numbers and open windows again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resume import two_process_run

pytestmark = pytest.mark.slow  # Python processes that import torch and transformers

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "preferences": ("sigmoid", "synced adapter", "synced model", "kto"),
    "evaluations and rollouts": ("best at the end", "rewards", "adaptive kl", "rollouts cut short"),
}


@pytest.mark.parametrize("group", CASES)
def test_every_step_in_two_processes(group: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", two_process_run.__name__, str(tmp_path), *CASES[group]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert tuple(results) == CASES[group]
    for name, result in results.items():
        assert result["differences"] == [], name
        assert result["steps"] >= 2, name
