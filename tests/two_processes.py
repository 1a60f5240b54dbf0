"""Two processes on a CPU, with the model's weights copied (DDP) or sharded by FSDP2, as the recipes do on GPUs.

accelerate shards on accelerators alone. Sharding processes say that they have XPUs, whose device is the CPU and whose
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


def launch_copied(module: ModuleType, *arguments: str, cache: Path) -> None:
    """Run a module in two processes, each with the whole model; its datasets are cached in `cache`."""
    _run(["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", module.__name__, *arguments], cache)


def launch_sharded(module: ModuleType, *arguments: str, cache: Path) -> None:
    """The same in two processes that shard weights, within `sharded()`."""
    options = ["--config_file", str(FSDP2), "--main_process_port", "0"]
    _run(
        ["accelerate.commands.launch", *options, "-m", module.__name__, *arguments],
        cache,
        ACCELERATE_TORCH_DEVICE="cpu",
    )


def _run(command: list[str], cache: Path, **variables: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def sharded() -> Iterator[None]:
    """While this is open, trainers of a process that `launch_sharded` started shard their weights."""
    torch.distributed.init_process_group("gloo")
    found = ("gloo", DistributedType.MULTI_XPU)
    with mock.patch.object(PartialState, "_prepare_backend", return_value=found):
        yield
    torch.distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which a process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
