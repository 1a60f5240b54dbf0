"""The checkpoints of an output directory: which verifies, which is the newest, which may go."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from alignkit.checkpoint.atomic import remove_folder
from alignkit.checkpoint.manifest import Manifest, read_manifest, verify
from alignkit.errors import CheckpointError

_NAME = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")


class Found(NamedTuple):
    """The newest checkpoint that verifies, and what is wrong with those that were passed over.

    Attributes:
        folder: the checkpoint; `None` where none verifies.
        skipped: a sentence about each checkpoint that is newer, or whose age nobody knows.
    """

    folder: Path | None
    skipped: tuple[str, ...]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders that are named like checkpoints, by their step."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def newest_verified(output_dir: Path) -> Found:
    """Look for the newest checkpoint that verifies: by the count of saves, not by step or clock."""
    sealed, skipped = _sealed(output_dir)
    for folder, _ in reversed(sealed):
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return Found(folder, tuple(skipped))
    return Found(None, tuple(skipped))


def next_sequence(output_dir: Path) -> int:
    """The number of the next save into `output_dir`."""
    sealed, _ = _sealed(output_dir)
    return 1 + max((manifest.sequence for _, manifest in sealed), default=0)


def unscheduled(output_dir: Path, others: Collection[int] = ()) -> list[Path]:
    """Checkpoints that a run made for itself, between those that its user asked for.

    Args:
        output_dir: where they lie.
        others: numbers of saves that were another run's.
    """
    return [
        folder
        for folder, manifest in _sealed(output_dir)[0]
        if manifest.run.get("is_scheduled") is False and manifest.sequence not in others
    ]


def saves_after(output_dir: Path, folder: Path | None) -> set[int]:
    """Numbers of the saves that a run which goes on from `folder` has no part in; all of them, if it starts anew."""
    sealed, _ = _sealed(output_dir)
    known = [manifest.sequence for each, manifest in sealed if folder and each.resolve() == folder.resolve()]
    return {manifest.sequence for _, manifest in sealed if manifest.sequence > max(known, default=-1)}


def rotate(output_dir: Path, limit: int | None, keep: tuple[Path, ...]) -> None:
    """Remove the oldest sealed checkpoints until `limit` are left, but none of `keep`, and not the newest.

    Folders without a manifest are nobody's to remove: they stay, and do not count.

    Args:
        output_dir: where the checkpoints lie.
        limit: `None` or below 1 keeps all.
        keep: the best one, and the last one that is known to be right.
    """
    if limit is None or limit < 1:
        return
    sealed = [folder for folder, _ in _sealed(output_dir)[0]]
    kept = {folder.resolve() for folder in (*keep, *sealed[-1:])}
    free = [folder for folder in sealed if folder.resolve() not in kept]
    for folder in free[: max(len(sealed) - max(limit, len(kept)), 0)]:
        remove_folder(folder)


def _sealed(output_dir: Path) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """Checkpoints with a readable manifest, oldest save first, and what is wrong with the others."""
    sealed, skipped = [], []
    for folder in checkpoint_folders(output_dir):
        try:
            sealed.append((folder, read_manifest(folder)))
        except CheckpointError as error:
            skipped.append(str(error))
    return sorted(sealed, key=lambda pair: pair[1].sequence), skipped
