"""The line about memory."""

from __future__ import annotations

import pytest
import torch

import alignkit
from alignkit.models.memory import MemoryReport, memory_report


def test_the_process_is_measured() -> None:
    cpu = torch.device("cpu")
    before = memory_report(cpu)
    held = torch.ones(50_000_000)
    after = memory_report(cpu)
    assert 150e6 < after.used - before.used < 400e6
    assert before.used <= before.peak
    assert after.peak >= after.used > held.numel()
    assert after.free < after.total
    assert alignkit.memory_report(cpu).device == "CPU"


def test_the_line() -> None:
    report = MemoryReport("Tesla T4", 2**30, 3 * 2**29, 10 * 2**30, 15 * 2**30)
    assert str(report) == "Tesla T4: 1.00 GiB used (at most 1.50), 10.0 of 15.0 GiB free"


@pytest.mark.gpu
def test_the_card_is_measured() -> None:
    cuda = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(cuda)
    before = memory_report(cuda)
    held = torch.ones(2**28, device=cuda)
    after = memory_report(cuda)
    assert after.used - before.used == held.numel() * 4
    assert after.peak >= after.used
    assert abs((before.free - after.free) - held.numel() * 4) < 2**28
