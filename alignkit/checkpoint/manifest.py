"""The manifest that seals a checkpoint: sizes and SHA-256 of its files, what run it is of, and a hash of all that.

It is written last. A folder without one was never finished; a folder that differs from its own is damaged, or was
changed since. `verify` says which, before anything in the folder is opened by a library.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from alignkit.data.reasons import shown
from alignkit.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_MAX_MANIFEST_BYTES = 64 * 2**20
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        sequence: counts the saves into an output directory; the newest checkpoint has the highest, whatever clock and
            step say.
        step: optimizer steps that were made.
        files: bytes and SHA-256 (hex) of every file, by its path in the checkpoint.
        run: what the run was made of, for comparison at a resume.
    """

    sequence: int
    step: int
    files: dict[str, tuple[int, str]]
    run: dict[str, Any]

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(size for size, _ in self.files.values())


def seal(folder: Path, *, sequence: int, step: int, run: Mapping[str, Any]) -> Manifest:
    """Write the manifest of everything that lies in `folder`.

    Raises:
        CheckpointError: the folder holds something that is neither a file nor a folder.
    """
    files = {name: (os.path.getsize(folder / name), _sha256(folder / name)) for name in sorted(_files(folder))}
    manifest = Manifest(sequence, step, files, dict(run))
    content = _content(manifest)
    (folder / MANIFEST).write_text(json.dumps({**content, "seal": _seal_of(content)}, indent=1), encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest, without looking at the files that it names.

    Raises:
        CheckpointError: there is none, it cannot be read, or it was changed.
    """
    path = folder / MANIFEST
    try:
        found = path.lstat()
    except OSError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: saving it was never finished, or another program made it"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    if found.st_size > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} has {found.st_size} bytes, more than any manifest")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _parsed(content, path)


def verify(folder: Path, *, may_lack: Collection[str] = ()) -> Manifest:
    """Check that `folder` holds exactly the files that its manifest names, byte for byte; return the manifest.

    What has a name that begins with a dot is let be: nothing here reads it, and file managers and notebooks make it.

    Args:
        folder: a checkpoint.
        may_lack: names of files that may be missing; those that are there must be right all the same.

    Raises:
        CheckpointError: with the first thing that is wrong.
    """
    manifest = read_manifest(folder)
    present = _files(folder)
    missing = sorted(manifest.files.keys() - present - set(may_lack))
    if missing:
        raise CheckpointError(f"{folder / missing[0]} is missing")
    extra = sorted(present - manifest.files.keys())
    if extra:
        raise CheckpointError(f"{folder / extra[0]} is not in {MANIFEST}: move what was added out of the folder")
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if name not in present:
            continue
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path} has {found} bytes instead of {size}")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path} was damaged or changed: its SHA-256 is not the manifest's")
    return manifest


def _files(folder: Path) -> set[str]:
    """Paths in `folder` of every file but the manifest, and what lies under a name that begins with a dot."""
    found: set[str] = set()
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                    raise CheckpointError(f"{entry.path} is a link or a special file, which no checkpoint holds")
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(Path(entry.path))
                else:
                    found.add(Path(entry.path).relative_to(folder).as_posix())
    return found - {MANIFEST}


def _content(manifest: Manifest) -> dict[str, Any]:
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in manifest.files.items()}
    return {
        "format": FORMAT,
        "sequence": manifest.sequence,
        "step": manifest.step,
        "files": files,
        "run": manifest.run,
    }


def _seal_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parsed(content: Any, path: Path) -> Manifest:
    """The manifest, if `content` is one and carries its own hash."""
    if not isinstance(content, dict) or "seal" not in content:
        raise CheckpointError(f"{path} is no manifest")
    rest = {key: value for key, value in content.items() if key != "seal"}
    try:
        is_sealed = content["seal"] == _seal_of(rest)
    except RecursionError as error:  # read just so, and nested too deep to be written again
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not is_sealed:
        raise CheckpointError(f"{path} was damaged or changed: it does not match its own seal")
    if rest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {shown(rest.get('format'))}; this version of alignkit reads {FORMAT}")
    sequence, step, files, run = (rest.get(key) for key in ("sequence", "step", "files", "run"))
    if not (_is_count(sequence) and _is_count(step) and isinstance(files, dict) and isinstance(run, dict)):
        raise CheckpointError(f"{path} lacks sequence, step, files or run")
    found: dict[str, tuple[int, str]] = {}
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
            raise CheckpointError(f"{path} names {shown(name)}, which does not lie in the checkpoint")
        if not (isinstance(entry, dict) and _is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)):
            raise CheckpointError(f"{path} says nothing of the size or the hash of {shown(name)}")
        found[name] = (entry["bytes"], entry["sha256"])
    return Manifest(sequence, step, found, run)  # type: ignore[arg-type]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
