"""How much memory this process uses, on the device that trains: one line to print before and after."""

from __future__ import annotations

import resource
import sys
from typing import NamedTuple

import psutil
import torch

from alignkit.models.load import training_device


class MemoryReport(NamedTuple):
    """Memory in bytes; printed, one line.

    Attributes:
        device: the GPU's name, or "CPU".
        used: allocated by torch on the GPU, or resident in this process.
        peak: the most that was used at a time, since the start or the last `torch.cuda.reset_peak_memory_stats()`.
        free: what is left for this process, other programs' share taken off.
        total: of the device.
    """

    device: str
    used: int
    peak: int
    free: int
    total: int

    def __str__(self) -> str:
        used, peak, free, total = (value / 2**30 for value in self[1:])
        return f"{self.device}: {used:.2f} GiB used (at most {peak:.2f}), {free:.1f} of {total:.1f} GiB free"


def memory_report(device: torch.device | None = None) -> MemoryReport:
    """Measure memory on `device`, by default the one that this process trains on.

    Devices other than CUDA and the CPU are reported as the CPU's memory.
    """
    device = training_device() if device is None else torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        name, used = torch.cuda.get_device_name(device), torch.cuda.memory_allocated(device)
        return MemoryReport(name, used, torch.cuda.max_memory_allocated(device), free + cached, total)
    machine = psutil.virtual_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else 1024 * peak
    used = psutil.Process().memory_info().rss
    return MemoryReport("CPU", used, max(peak_bytes, used), machine.available, machine.total)
