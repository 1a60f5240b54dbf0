"""The card that a check believes in: how much memory it has, what it can compute, and what fails on it."""

from __future__ import annotations

import contextlib
import gc
import io
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

GIB = 2**30
CONTEXT_BYTES = 0.6 * GIB  # of a card's memory go to the CUDA context, which the allocator's cap does not count
TURING = (7, 5)
# What a check reports instead of ending the script. A gradient scaler asserts.
FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, ImportError, AssertionError, LookupError,
    OSError,
)  # fmt: skip


def described(error: BaseException, length: int = 500) -> str:
    """An error in one short text."""
    return f"{type(error).__name__}: {str(error).strip()[:length]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the trainers' own lines and tables out of the report."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class Clock(TrainerCallback):
    """Seconds from the end of each `steps` optimizer steps to the next, with the device's queue emptied there."""

    def __init__(self, device: torch.device, steps: int = 1) -> None:
        self.device, self.steps, self.seconds = device, steps, list[float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


@contextlib.contextmanager
def capped(cap_gb: float, device: torch.device) -> Iterator[None]:
    """Let this process have no more of the GPU than a card of `cap_gb` GiB would give it, and believe so too."""
    if device.type != "cuda":
        yield
        return
    free(device)
    total = torch.cuda.get_device_properties(device).total_memory
    limit = int(min(cap_gb * GIB - CONTEXT_BYTES, total))
    torch.cuda.set_per_process_memory_fraction(limit / total, device)

    def free_and_total(*args: Any) -> tuple[int, int]:
        return limit - torch.cuda.memory_reserved(device), limit

    try:
        # The automatic token budget asks how much is free, and must not be told of the rest of the card.
        with mock.patch("torch.cuda.mem_get_info", free_and_total):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def free(device: torch.device) -> None:
    """Give back what nobody holds, and count peaks from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextlib.contextmanager
def as_turing() -> Iterator[None]:
    """Let the library see compute capability 7.5, and keep SDPA from kernels that such a card lacks."""
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=TURING),
        sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    ):
        yield
