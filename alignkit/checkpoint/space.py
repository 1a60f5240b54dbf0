"""Room on the disk: what a checkpoint takes, and what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

from alignkit.errors import CheckpointError

# Tokenizer, states and manifest of a checkpoint, when nobody knows better.
SMALL_FILES_BYTES = 32 * 2**20


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written where `folder` lies or will lie."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that there is room.

    Raises:
        CheckpointError: with how much is missing.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise CheckpointError(
            f"{what} takes {size(needed_bytes)}, and {size(free)} are free where {folder} lies: "
            f"{size(needed_bytes - free)} are missing. Make room, or choose another output_dir."
        )


def size(count: int) -> str:
    """Bytes for people to read, such as "1.5 GB"."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
