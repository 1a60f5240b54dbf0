"""Two processes on a CPU that shard weights by FSDP2, as the recipes do on GPUs.

accelerate shards on accelerators alone. These processes say that they have XPUs, whose device is the CPU and whose
collectives are gloo's. All else is as on GPUs: `accelerate launch` with the recipes' own file, and sharding, gathering,
saving and loading by torch and accelerate.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[1]
FSDP2 = ROOT / "recipes/accelerate/fsdp2.yaml"


def launch(module: ModuleType, *arguments: str, cache: Path) -> None:
    """Run a module in two processes whose weights are to be sharded; its datasets are cached in `cache`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2)]
    command += ["--main_process_port", "0", "-m", module.__name__, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(cache)}
    environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def sharded() -> Iterator[None]:
    """While this is open, trainers of a process that `launch` started shard their weights."""
    torch.distributed.init_process_group("gloo")
    found = ("gloo", DistributedType.MULTI_XPU)
    with mock.patch.object(PartialState, "_prepare_backend", return_value=found):
        yield
    torch.distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which a process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
