"""Out of memory: which errors mean it, and how to give back what a failed pass still holds."""

from __future__ import annotations

import gc

import torch

from alignkit.errors import AlignkitError

# What errors that are not of torch's own class say: the allocator of a CPU, and libraries that allocate by themselves.
_SIGNS = (
    "can't allocate memory",
    "DefaultCPUAllocator",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the machine, has no memory left for what was asked."""
    if isinstance(error, AlignkitError):  # what was made of one already
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release_memory() -> None:
    """Give back what nothing refers to any more; call it outside the `except` block, whose error holds the pass."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
