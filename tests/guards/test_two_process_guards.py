"""Two processes over gloo agree on what is a bad step: what one of them saw, none of them uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.guards import two_process_guards

pytestmark = pytest.mark.slow  # two Python processes import torch and transformers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", two_process_guards.__name__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(folder)}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["dpo", "reward", "ppo"])
def test_a_bad_number_of_one_process_is_skipped_by_both(kind: str, found: list[dict[str, Any]]) -> None:
    first, second = (each[kind] for each in found)
    assert first == second
    ((step, named),) = first["skipped"]
    assert step == 2
    assert named == [11] if kind != "ppo" else len(named) == 4
    assert first["stays"]
    assert first["moves"]
    assert first["agrees"]
