"""Files and folders that appear whole or not at all, whatever stops the process or the machine.

What is new is written beside its place under a name that no reader looks for, brought to disk (`fsync`), and then
renamed: a rename within one file system is atomic, and syncing the parent makes it last.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

STAGED, REPLACED, REMOVED = ".saving-", ".replaced-", ".removing-"
_LEFTOVER = re.compile(rf"^(?:{re.escape(STAGED)}|{re.escape(REPLACED)}|{re.escape(REMOVED)})(?P<name>.+)$")


def staging_of(target: Path) -> Path:
    """The sibling that `target` is written in until it is whole."""
    return target.with_name(STAGED + target.name)


def put_in_place(target: Path) -> None:
    """Bring `staging_of(target)` to disk and give it its name. A folder that has the name now is removed afterwards.

    Killed between the two renames that replacing a folder takes, `tidy` brings the old one back.
    """
    staged, replaced = staging_of(target), target.with_name(REPLACED + target.name)
    sync_tree(staged)
    if target.exists():
        _remove_tree(replaced)
        os.rename(target, replaced)
    os.rename(staged, target)
    sync_folder(target.parent)
    _remove_tree(replaced)


def remove_folder(target: Path) -> None:
    """Remove a folder; killed on the way, it leaves nothing under the folder's own name."""
    removed = target.with_name(REMOVED + target.name)
    _remove_tree(removed)
    os.rename(target, removed)
    _remove_tree(removed)


def discard(staged: Path) -> None:
    """Remove what was written aside, as far as the disk lets it; it counts for nothing, and `tidy` finds the rest."""
    shutil.rmtree(staged, ignore_errors=True)


def tidy(parent: Path) -> None:
    """Clear away what a process that was stopped left in `parent`: half-written, half-removed, half-replaced folders.

    Call it only while no other process writes there.
    """
    for path in list(parent.iterdir()) if parent.is_dir() else []:
        match = _LEFTOVER.match(path.name)
        if match is None:
            continue
        target = parent / match["name"]
        if path.name.startswith(REPLACED) and not target.exists():
            os.rename(path, target)
        else:
            _remove_tree(path)


@contextlib.contextmanager
def files_into(folder: Path) -> Iterator[Path]:
    """Give a folder to write files in; when the block ends well, each of them replaces its namesake in `folder`.

    Every file is the old one or the new one at any moment; other files of `folder` stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f"{STAGED}files"
    _remove_tree(staged)
    staged.mkdir()
    try:
        yield staged
        sync_tree(staged)
        for path in sorted(staged.rglob("*")):
            target = folder / path.relative_to(staged)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
        sync_folder(folder)
    finally:
        _remove_tree(staged)


@contextlib.contextmanager
def file_in_place(path: Path) -> Iterator[Path]:
    """Give a path to write a file at; when the block ends well, it replaces `path`, on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{STAGED}{path.name}-{os.getpid()}.tmp")
    try:
        yield staged
        _sync(staged)
        os.replace(staged, path)
        sync_folder(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder`, and `folder` itself, to disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent) / name)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to disk, where the system can do that."""
    if sys.platform != "win32":
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_tree(path: Path) -> None:
    """Remove a folder, or a link or file of that name; one that is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
